"""The trainable image tokenizer: shapes, locality of its codes, saving, learning."""

import json

import pytest
import torch

from tokenizers_mm import Autoencoder, AutoencoderConfig, ImageTokenizer, reconstruction_loss
from tokenizers_mm.autoencoder import distinct

TINY = {"channels": (8, 12, 16), "encoder_blocks": (0, 1, 1), "decoder_blocks": (0, 1, 1), "levels": (5, 4)}


def stirred(**changes) -> Autoencoder:
    """A tiny model all of whose layers do something, also those that start at zero."""
    rng = torch.Generator().manual_seed(1)
    model = Autoencoder(AutoencoderConfig(**(TINY | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.5)
    return model


def pictures(count: int, height: int = 32, width: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_shapes_and_sizes():
    model: ImageTokenizer = stirred()
    codes = model.encode(pictures(2, 16, 40))
    assert codes.shape == (2, *model.grid(16, 40)) == (2, 2, 5)
    assert codes.dtype == torch.long
    assert (model.size, model.downsample, model.digits) == (20, 8, (5, 4))
    images = model.decode(codes)
    assert images.shape == (2, 3, 16, 40)
    assert images.dtype == torch.float32
    assert images.abs().max() <= 1
    assert not images.requires_grad


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_the_downsample_factor_follows_the_number_of_stages(stages):
    config = AutoencoderConfig(
        channels=(8,) * stages, encoder_blocks=(1,) * stages, decoder_blocks=(1,) * stages
    )
    model = Autoencoder(config)
    assert model.downsample == config.downsample == 2**stages
    assert model(pictures(1, 32, 16)).images.shape == (1, 3, 32, 16)
    assert model.encode(pictures(1, 32, 16)).shape == (1, 32 >> stages, 16 >> stages)


def test_a_compact_tokenizer_draws_the_same_pictures_with_fewer_codes(tmp_path):
    model, images = stirred(), pictures(2)
    codes = model.encode(images)
    compact = model.compact(codes, (1, 1))
    again = compact.encode(images)
    assert compact.size < model.size
    assert compact.digits == tuple(len(digits.unique()) for digits in (codes % 5, codes // 5))
    assert torch.equal(compact.decode(again), model.decode(codes))
    compact.save_pretrained(tmp_path)
    loaded = Autoencoder.from_pretrained(tmp_path)
    assert loaded.config == compact.config
    assert torch.equal(loaded.encode(images), again)
    with pytest.raises(ValueError, match="compact already"):
        compact.compact(again, (1, 1))
    with pytest.raises(ValueError, match="come together"):
        AutoencoderConfig(**TINY, groups=(1, 1))


def test_training_and_use_agree():
    model = stirred()
    images = pictures(3)
    with torch.no_grad():
        output, codes = model(images)
    assert torch.equal(codes, model.encode(images))
    torch.testing.assert_close(output.clamp(-1, 1), model.decode(codes), rtol=0, atol=1e-4)


def changed_codes(model: Autoencoder) -> set[tuple[int, int]]:
    """Which vectors before the quantiser move when only the pixels of patch (1, 2) do."""
    images = pictures(1)
    other = images.clone()
    other[:, :, 8:16, 16:24] = pictures(1, 8, 8, seed=5)
    with torch.no_grad():
        z, z_other = (model.encoder(x.permute(0, 2, 3, 1)) for x in (images, other))
    moved = (z != z_other).any(-1)[0]
    return {(int(row), int(column)) for row, column in moved.nonzero()}


def test_with_context_1_a_patch_changes_only_its_own_code():
    assert changed_codes(stirred(context=1)) == {(1, 2)}


def test_with_context_3_the_neighbours_see_it():
    changed = changed_codes(stirred(context=3))
    assert changed > {(1, 2)}
    assert (1, 1) in changed


def test_equal_patches_have_equal_codes_wherever_they_stand():
    model = stirred(context=1)
    patch = pictures(1, 8, 8)
    images = pictures(2, seed=3)
    images[0, :, 8:16, 24:32] = patch[0]
    images[1, :, 0:8, 0:8] = patch[0]
    codes = model.encode(images)
    assert codes[0, 1, 3] == codes[1, 0, 0] == model.encode(patch)[0, 0, 0]
    assert len(codes.unique()) > 3


def test_a_picture_does_not_depend_on_its_batch():
    model = stirred(context=3).double()
    images = pictures(4).double()
    codes = model.encode(images)
    for number in range(4):
        assert torch.equal(model.encode(images[number : number + 1])[0], codes[number])


def test_saved_and_loaded_it_is_the_same(tmp_path):
    model = stirred(context=3)
    model.save_pretrained(tmp_path / "tokenizer")
    assert sorted(file.name for file in (tmp_path / "tokenizer").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    loaded = Autoencoder.from_pretrained(tmp_path / "tokenizer")
    assert loaded.config == model.config
    assert not loaded.training
    codes = model.encode(pictures(2))
    assert torch.equal(loaded.encode(pictures(2)), codes)
    assert torch.equal(loaded.decode(codes), model.decode(codes))


def test_a_folder_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no autoencoder"):
        Autoencoder.from_pretrained(tmp_path)
    stirred().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"levels": [5, 4, 3]}))
    with pytest.raises(ValueError, match="do not fit"):
        Autoencoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"level": [5, 4]}))
    with pytest.raises(ValueError, match="level"):
        Autoencoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 20, 32), "multiples of 8 pixels, got 32 x 20"),
        (torch.zeros(1, 3, 0, 32), "multiples of 8"),
        (torch.zeros(1, 1, 32, 32), r"\(B, 3, H, W\)"),
        (torch.zeros(3, 32, 32), r"\(B, 3, H, W\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "uint8"),
    ],
)
def test_other_pictures_are_refused(images, message):
    model = stirred()
    with pytest.raises(ValueError, match=message):
        model.encode(images)
    with pytest.raises(ValueError, match=message):
        model(images)


@pytest.mark.parametrize(
    "codes", [torch.full((1, 2, 2), 20), torch.full((1, 2, 2), -1), torch.zeros(1, 2, 2)]
)
def test_other_codes_are_refused(codes):
    with pytest.raises(ValueError, match="codes must"):
        stirred().decode(codes)


@pytest.mark.parametrize(
    "changes",
    [
        {"channels": ()},
        {"encoder_blocks": (1, 1)},
        {"decoder_blocks": (1, 1, -1)},
        {"context": 2},
        {"levels": (1,)},
    ],
)
def test_impossible_configurations_are_refused(changes):
    with pytest.raises(ValueError, match=r"wants|must be odd"):
        Autoencoder(AutoencoderConfig(**(TINY | changes)))


def test_every_parameter_learns_and_the_loss_falls():
    torch.manual_seed(0)
    model = Autoencoder(AutoencoderConfig(**TINY))
    colours = pictures(8, 4, 4)
    images = colours.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = reconstruction_loss(images, model(images).images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_the_loss_is_what_it_says():
    images = torch.zeros(1, 3, 2, 2)
    output = torch.zeros(1, 3, 2, 2)
    output[:, :, 0, 0] = 0.5
    absolute, square, edges = 0.125, 0.0625, 0.25 + 0.25
    assert reconstruction_loss(images, output, square=0, edge=0).item() == absolute
    assert reconstruction_loss(images, output, square=2, edge=0).item() == absolute + 2 * square
    assert (
        reconstruction_loss(images, output, square=2, edge=0.5).item() == absolute + 2 * square + 0.5 * edges
    )
    assert reconstruction_loss(output, output).item() == 0


def test_distinct_patches_are_encoded_once_and_nothing_else_changes():
    model = stirred(context=1)
    some = pictures(3, 8, 8)
    images = some[torch.tensor([0, 1, 1, 2, 0, 0, 2, 1])].view(2, 4, 3, 8, 8)
    images = images.permute(0, 2, 3, 1, 4).reshape(2, 3, 8, 32)
    assert torch.equal(model.encode(images), model(images).codes)
    found, which = distinct(some[torch.tensor([0, 1, 1, 2, 0])])
    assert len(found) == 3
    assert torch.equal(found[which], some[torch.tensor([0, 1, 1, 2, 0])])


def test_patches_whose_hashes_collide_are_not_merged(monkeypatch):
    monkeypatch.setattr(torch, "randint", lambda low, high, size, generator: torch.zeros(size).long())
    both = pictures(2, 8, 8)
    found, which = distinct(both)
    assert torch.equal(found[which], both)
