"""Tokenizers of transformers and diffusers behind our protocols; all are built here, none is downloaded."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from tokenizers_mm import (
    HuggingFaceTokenizer,
    ImageTokenizer,
    TextTokenizer,
    VQModelTokenizer,
    prepare_torchvision,
)

TEXTS = [
    "",
    "a red circle",
    " <|endoftext|> <mask><|soi|>",
    "don't  !\n",
    "\U0001f469\u200d\U0001f680 \u4e2d",
]


@pytest.fixture(scope="module")
def hugging_face():
    prepare_torchvision()
    from transformers import PreTrainedTokenizerFast

    alphabet = {piece: number for number, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=alphabet | {"<|endoftext|>": 256}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        mask_token="<mask>",
        clean_up_tokenization_spaces=True,
    )
    tokenizer.add_tokens(["<|soi|>"])  # as a family does that marks its control tokens as ordinary words
    return tokenizer


def test_control_tokens_cannot_be_typed(hugging_face):
    naive = hugging_face.encode(TEXTS[2])
    assert {256, 257, 258} <= set(naive)
    ours: TextTokenizer = HuggingFaceTokenizer(hugging_face)
    assert ours.size == 259
    for text in TEXTS:
        ids = ours.encode(text)
        assert max(ids, default=0) < 256
        assert ours.decode(ids) == text
    assert ours.decode([256]) == "<|endoftext|>"
    with pytest.raises(ValueError, match="id 259 is no text id"):
        ours.decode([259])


def test_ordinary_added_tokens_stay_words(hugging_face):
    ids = HuggingFaceTokenizer(hugging_face, ordinary=["<|soi|>"]).encode("<|soi|><mask>")
    assert ids[0] == 258
    assert 257 not in ids


def test_a_saved_folder_reads_the_same(hugging_face, tmp_path):
    hugging_face.save_pretrained(tmp_path)
    loaded = HuggingFaceTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert loaded.encode(text) == HuggingFaceTokenizer(hugging_face).encode(text)
    with pytest.raises(ValueError, match="no tokenizer in"):
        HuggingFaceTokenizer.from_pretrained(tmp_path / "elsewhere")


@pytest.fixture(scope="module")
def vq_model():
    prepare_torchvision()
    from diffusers.models.autoencoders.vq_model import VQModel

    torch.manual_seed(0)
    model = VQModel(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        num_vq_embeddings=32,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    with torch.no_grad():  # a codebook of what the encoder gives, so that many codes occur
        vectors = model.encode(torch.rand(1, 3, 16, 32) * 2 - 1).latents.permute(0, 2, 3, 1)
        model.quantize.embedding.weight.copy_(vectors.reshape(32, 4))
    return model


@pytest.mark.parametrize("black", [-1.0, 0.0])
def test_a_vq_model_is_an_image_tokenizer(vq_model, black):
    ours: ImageTokenizer = VQModelTokenizer(vq_model, black=black)
    assert (ours.size, ours.downsample, ours.digits, ours.grid(16, 32)) == (32, 4, None, (4, 8))
    images = torch.rand(2, 3, 16, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = ours.encode(images)
    assert codes.shape == (2, 4, 8)
    assert codes.dtype == torch.long
    assert len(codes.unique()) > 3
    values = images if black < 0 else (images + 1) / 2
    with torch.no_grad():
        expected = vq_model(values).sample
    expected = expected if black < 0 else expected * 2 - 1
    torch.testing.assert_close(ours.decode(codes), expected.clamp(-1, 1), rtol=1e-4, atol=1e-5)


def test_a_saved_vq_model_reads_the_same(vq_model, tmp_path):
    vq_model.save_pretrained(tmp_path)
    codes = torch.arange(32).view(1, 4, 8)
    loaded = VQModelTokenizer.from_pretrained(tmp_path)
    assert torch.equal(loaded.decode(codes), VQModelTokenizer(vq_model).decode(codes))
    with pytest.raises(ValueError, match="no VQModel in"):
        VQModelTokenizer.from_pretrained(tmp_path / "elsewhere")


def test_wrong_pictures_and_ranges_are_refused(vq_model):
    with pytest.raises(ValueError, match="multiples of 4"):
        VQModelTokenizer(vq_model).encode(torch.zeros(1, 3, 18, 32))
    with pytest.raises(ValueError, match=r"codes must lie in 0\.\.31"):
        VQModelTokenizer(vq_model).decode(torch.full((1, 2, 2), 32))
    with pytest.raises(ValueError, match="black must be less"):
        VQModelTokenizer(vq_model, black=1.0)
