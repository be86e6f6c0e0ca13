import torch
from torchvision.transforms import functional

from reference import normalise_pixels

MEAN, STD = torch.tensor([0.4, 0.5, 0.6]).double(), torch.tensor([0.2, 0.3, 0.4]).double()


def images():
    torch.manual_seed(0)
    return torch.randint(256, (4, 3, 5, 6), dtype=torch.uint8)


def test_it_is_torchvisions_normalize():
    expected = functional.normalize(images().double() / 255, MEAN, STD)
    torch.testing.assert_close(normalise_pixels(images(), MEAN, STD), expected)


def test_a_rectangle_is_filled_by_channel_row_and_column_and_all_else_stays():
    erased = torch.zeros(4, 1, 5, dtype=torch.int32)
    erased[2] = torch.tensor([1, 2, 3, 2, 4])
    noise = torch.arange(22.0).double()
    found, plain = normalise_pixels(images(), MEAN, STD, None, erased, noise), normalise_pixels(images(), MEAN, STD)
    assert torch.equal(found[2, :, 1:4, 2:4], noise[4:].view(3, 3, 2))
    plain[2, :, 1:4, 2:4] = found[2, :, 1:4, 2:4]
    assert torch.equal(found, plain)


def test_images_are_mixed_from_the_batchs_two_ends_and_cut_out_of_the_unmixed_partner():
    plain = normalise_pixels(images(), MEAN, STD)
    shares = torch.tensor([[0.3, 0.7], [1.0, 0.0], [1.0, 0.0], [0.5, 0.5]]).double()
    boxes = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [1, 2, 3, 4], [4, 0, 1, 6]], dtype=torch.int32)
    found = normalise_pixels(images(), MEAN, STD, shares=shares, boxes=boxes)
    torch.testing.assert_close(found[0], 0.3 * plain[0] + 0.7 * plain[3])
    assert torch.equal(found[1], plain[1])
    assert torch.equal(found[2, :, 1:4, 2:6], plain[1, :, 1:4, 2:6]) and torch.equal(found[2, :, :1], plain[2, :, :1])
    assert torch.equal(found[3, :, 4], plain[0, :, 4])
    torch.testing.assert_close(found[3, :, :4], 0.5 * plain[3, :, :4] + 0.5 * plain[0, :, :4])
