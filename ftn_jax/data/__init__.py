"""Classification data as uint8 examples by index, and batches of one static shape."""

from ftn_jax.data.ahead import prefetch
from ftn_jax.data.batches import eval_batches, train_batches
from ftn_jax.data.boxed import load_cars, load_cub
from ftn_jax.data.decathlon import load_decathlon, load_decathlon_test
from ftn_jax.data.device import augmented, on_device
from ftn_jax.data.domain import (
    ArraySource,
    DenseExample,
    Domain,
    Example,
    Source,
    Split,
    Subset,
    digest,
    limit,
    split,
)
from ftn_jax.data.domainnet import load_domainnet
from ftn_jax.data.fer2013 import load_fer2013
from ftn_jax.data.files import FileSource
from ftn_jax.data.folders import load_folder
from ftn_jax.data.pipeline import (
    Compose,
    Step,
    Transform,
    describe,
    from_description,
)
from ftn_jax.data.protocols import (
    CLIP,
    IMAGENET,
    Transforms,
    clip_transforms,
    cropped_transforms,
    decathlon_transforms,
    imagenet_transforms,
    measure_normalize,
)
from ftn_jax.data.published import (
    DECATHLON,
    DOMAINNET,
    FER2013,
    IMAGENET_TO_SKETCH,
    Sizes,
    check_sizes,
)
from ftn_jax.data.readers import (
    find_domains,
    load_digits,
    load_domain,
    load_npz,
)
from ftn_jax.data.steps import (
    Batch,
    Shard,
    Steps,
    eval_steps,
    steps_per_epoch,
    train_steps,
)
from ftn_jax.data.tfds_domains import TFDSSource, load_tfds
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
from ftn_jax.data.workers import grain_dataset

__all__ = [
    "TFDSSource",
    "load_tfds",
    "CLIP",
    "DECATHLON",
    "DOMAINNET",
    "FER2013",
    "IMAGENET",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "IMAGENET_TO_SKETCH",
    "ArraySource",
    "Batch",
    "CenterCrop",
    "Compose",
    "DenseExample",
    "Domain",
    "Example",
    "FileSource",
    "Flip",
    "Normalize",
    "RandomCrop",
    "RandomResizedCrop",
    "Resize",
    "ResizeShort",
    "Shard",
    "Shift",
    "Sizes",
    "Source",
    "Split",
    "Step",
    "Steps",
    "Subset",
    "ToRGB",
    "Transform",
    "Transforms",
    "augmented",
    "check_sizes",
    "clip_transforms",
    "cropped_transforms",
    "decathlon_transforms",
    "describe",
    "digest",
    "eval_batches",
    "eval_steps",
    "find_domains",
    "from_description",
    "grain_dataset",
    "imagenet_transforms",
    "limit",
    "load_cars",
    "load_cub",
    "load_decathlon",
    "load_decathlon_test",
    "load_digits",
    "load_domain",
    "load_domainnet",
    "load_fer2013",
    "load_folder",
    "load_npz",
    "measure_normalize",
    "on_device",
    "prefetch",
    "split",
    "steps_per_epoch",
    "train_batches",
    "train_steps",
]
