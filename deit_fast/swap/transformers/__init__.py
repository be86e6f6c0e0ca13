"""transformers: the layers, embeddings and their parts of DeiT and ViT, and their classifiers.

One description serves both models: a mixin of this library's in front of each one's stock class.
Of the PreTrainedModel classes only the classifiers change: transformers keeps what a model can record by its exact
class, and their hidden states and attentions are recorded by the model within.
"""

import transformers
from transformers.models.deit import modeling_deit
from transformers.models.vit import modeling_vit

for _library, _prefix in ((modeling_deit, "DeiT"), (modeling_vit, "ViT")):
    if not hasattr(_library, f"{_prefix}MLP"):
        raise ImportError(
            f"deit_fast needs transformers 5.16 or newer, found {transformers.__version__}: "
            f'pip install "deit_fast[transformers]"'
        )

# Importing them registers their classes; the layer imports its attention and its MLP.
from deit_fast.swap.transformers import classifier, embeddings, layer  # noqa: E402, F401
