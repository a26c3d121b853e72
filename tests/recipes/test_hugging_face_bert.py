"""A Hugging Face fine-tuning of BERT in the settings of swamp_fast, at a tiny size.

The original is examples/pytorch/text-classification/run_glue.py of transformers, whose Trainer has these arguments:

    --learning_rate 2e-5 --num_train_epochs 3 --per_device_train_batch_size 16 --gradient_accumulation_steps 2
    --lr_scheduler_type linear --warmup_ratio 0.1 --weight_decay 0.01 --max_grad_norm 1.0 --optim adamw_torch

The pretrained weights are the ticket: ticket_epochs = 0.

What it has that can't be said here:

- A warm-up in steps (--warmup_steps). Here it is in epochs or a fraction of one: --warmup_ratio 0.1 of 3 epochs is 0.3.
- A schedule that ends at the last of --max_steps. Here a training has a whole number of epochs.
- Batches that are padded to their own longest text, and batches of texts of similar length (--group_by_length). Here
  all samples have one shape: pad to one length, and let the attention mask say what is text.
- Gradients that are averaged over all tokens of the accumulated batches. Here each batch has the same weight.
- float16 with a gradient scaler (--fp16). Here there is bfloat16.
- Returning to the best checkpoint of a training (--load_best_model_at_end). Here `on_epoch` and `on_cycle` may stop a
  run, and `combine = "best"` chooses among particles, but a training always ends with its last epoch.
- DeepSpeed, FSDP, and other ways to split a model between devices.
"""

from __future__ import annotations

import pytest
import torch
from examples import ignored, same_masks
from torch import Tensor, nn

RECIPE = {
    "ticket_epochs": 0,
    "epochs": 3,
    "batch_size": 16,
    "accumulate": 2,
    "optimizer": "adamw",
    "lr": 2e-5,
    "schedule": "linear",
    "warmup_epochs": 0.3,
    "weight_decay": 0.01,
    "groups": [{"params": ["*bias", "*[Nn]orm*.weight"], "weight_decay": 0.0}],
    "clip_norm": 1.0,
    "average": "none",
}
TINY = {"batch_size": 4, "lr": 2e-3}

WORDS, LENGTH, LABELS = 50, 12, 3
Texts = tuple[dict[str, Tensor], Tensor]


class SmallEncoder(nn.Module):
    """An encoder of torch's own modules. It takes the inputs of BERT and returns what BERT returns, a dict."""

    def __init__(self, width: int = 16, depth: int = 2) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(WORDS, width), nn.Embedding(LENGTH, width)
        self.norm = nn.LayerNorm(width)
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, 0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.classifier = nn.Linear(width, LABELS)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Map tokens [B, LENGTH], of which the mask has 1 for text and 0 for padding, to logits [B, LABELS]."""
        embedded = self.norm(self.words(input_ids) + self.positions.weight)
        encoded = self.encoder(embedded, src_key_padding_mask=attention_mask == 0)
        return {"logits": self.classifier(encoded[:, 0])}


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=WORDS, **sizes, max_position_embeddings=LENGTH, num_labels=LABELS)
    return transformers.BertForSequenceClassification(config)


def texts(count: int) -> Texts:
    """Tokens as a tokenizer with padding="max_length" gives them, and labels."""
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(3, LENGTH + 1, (count, 1), generator=generator)
    mask = (torch.arange(LENGTH) < lengths).long()
    tokens = torch.randint(1, WORDS, (count, LENGTH), generator=generator) * mask
    return {"input_ids": tokens, "attention_mask": mask}, torch.arange(count) % LABELS


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs)["logits"]


def test_every_setting_has_an_effect():
    assert ignored(SmallEncoder(), texts(60), RECIPE | TINY | {"clip_norm": 0.1}, forward=logits) == []


@pytest.mark.parametrize("make", [SmallEncoder, bert])
def test_fine_tuning_bert(make):
    result = same_masks(make(), texts(36), texts(24), forward=logits, **RECIPE | TINY)
    assert not any("mbedding" in name or "classifier" in name for name in result.masks)
