"""Small models with random weights, saved to folders as transformers saves them."""

from __future__ import annotations

from pathlib import Path

import torch


def siglip(folder: Path, side: int = 32) -> Path:
    """Write a SigLIP model of a few thousand weights, with its image processor."""
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**sizes, "image_size": side, "patch_size": 8}
    torch.manual_seed(3)
    text = {**sizes, "vocab_size": 40, "max_position_embeddings": 8, "projection_size": 16}
    SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    SiglipImageProcessor(size={"height": side, "width": side}).save_pretrained(folder)
    return folder
