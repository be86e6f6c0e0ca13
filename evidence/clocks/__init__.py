"""What a launch takes of a GPU's clocks, counted in its machine code; and what time may follow from it, modelled."""
