"""Classification data as uint8 examples by index, and batches of one static shape."""

from ftn_jax.data.batches import (
    Batch,
    eval_batches,
    prefetch,
    steps_per_epoch,
    train_batches,
)
from ftn_jax.data.domain import (
    ArraySource,
    Domain,
    Example,
    Source,
    Split,
    Subset,
    limit,
    split,
)
from ftn_jax.data.folders import FolderSource, load_folder
from ftn_jax.data.pipeline import (
    Compose,
    Step,
    Transform,
    describe,
    from_description,
)
from ftn_jax.data.readers import (
    find_domains,
    load_digits,
    load_domain,
    load_npz,
)
from ftn_jax.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    CenterCrop,
    Flip,
    Normalize,
    RandomCrop,
    RandomResizedCrop,
    Resize,
    ResizeShort,
    Shift,
    ToRGB,
)

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "ArraySource",
    "Batch",
    "CenterCrop",
    "Compose",
    "Domain",
    "Example",
    "Flip",
    "FolderSource",
    "Normalize",
    "RandomCrop",
    "RandomResizedCrop",
    "Resize",
    "ResizeShort",
    "Shift",
    "Source",
    "Split",
    "Step",
    "Subset",
    "ToRGB",
    "Transform",
    "describe",
    "eval_batches",
    "find_domains",
    "from_description",
    "limit",
    "load_digits",
    "load_domain",
    "load_folder",
    "load_npz",
    "prefetch",
    "split",
    "steps_per_epoch",
    "train_batches",
]
