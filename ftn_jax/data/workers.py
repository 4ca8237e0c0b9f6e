"""Batches made by Grain: worker processes, and iterators that can be saved."""

from typing import Any

from ftn_jax.data.steps import Steps, at_least


def grain_dataset(
    steps: Steps,
    *,
    start_step: int = 0,
    threads: int = 0,
    workers: int = 0,
    ahead: int = 2,
) -> Any:
    """Give a run's batches as a `grain.IterDataset`.

    Its iterators have Grain's `get_state` and `set_state` (and Orbax saves them by
    `grain.checkpoint`); a state belongs to a dataset that was made alike, with the
    same steps, `start_step` and workers. The order and the augmentation are those of
    `steps`, whatever the number of workers.

    Args:
        steps: the batches, from `train_steps` or `eval_steps`.
        start_step: where the dataset begins.
        threads: in each process, that make batches side by side.
        workers: processes that make batches; 0 makes them in this one. They are
            spawned: a script needs `if __name__ == "__main__":`, and the source must
            be picklable.
        ahead: batches that are kept ready in each process.

    Raises:
        ValueError: where a number is out of range.
        ImportError: where Grain is absent.
    """
    at_least(0, start_step=start_step, threads=threads, workers=workers)
    at_least(1, ahead=ahead)
    try:
        import grain
    except ImportError as error:
        raise ImportError(
            "worker processes need Grain: pip install 'ftn_jax[data]'"
        ) from error
    from absl import flags

    if not flags.FLAGS.is_parsed():  # Grain reads its own, and has defaults for all
        flags.FLAGS.mark_as_parsed()
    source: Any = steps
    batches = grain.MapDataset.source(source)[start_step:]
    dataset = batches.to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(ahead, threads))
    )
    if workers:
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=workers, per_worker_buffer_size=ahead
            )
        )
    return dataset
