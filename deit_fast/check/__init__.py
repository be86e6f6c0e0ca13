"""Every operator against float64 and stock PyTorch, and what counts and stands in for a GPU meanwhile."""
