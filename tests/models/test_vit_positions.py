import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftn_jax.models.vit_positions import interpolate_positions


def test_positions_of_the_same_grid_are_kept():
    positions = np.random.default_rng(0).normal(size=(1 + 25, 4)).astype(np.float32)
    same = interpolate_positions(jnp.asarray(positions), (5, 5))
    np.testing.assert_array_equal(same, positions)


def test_positions_of_another_grid():
    rng = np.random.default_rng(0)
    positions = jnp.asarray(rng.normal(size=(2 + 9, 4)), jnp.float32)
    found = interpolate_positions(positions, (5, 4), prefix_tokens=2)
    assert found.shape == (2 + 20, 4)
    np.testing.assert_array_equal(found[:2], positions[:2])
    # Weights sum to one, and mirrored positions give mirrored ones.
    flat = interpolate_positions(jnp.full((9, 4), 2.5), (5, 4), prefix_tokens=0)
    np.testing.assert_allclose(flat, 2.5, rtol=1e-6)
    grid = positions[2:].reshape(3, 3, 4)
    mirrored = interpolate_positions(
        grid[:, ::-1].reshape(9, 4), (5, 4), prefix_tokens=0
    ).reshape(5, 4, 4)
    np.testing.assert_allclose(
        mirrored[:, ::-1].reshape(20, 4), found[2:], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(("rows", "prefix"), [(10, 0), (1, 1), (11, 1), (0, 1)])
def test_positions_of_no_square_grid(rows, prefix):
    with pytest.raises(ValueError, match="not of a square grid"):
        interpolate_positions(jnp.ones((rows, 4)), (2, 2), prefix_tokens=prefix)


@pytest.mark.parametrize(("old", "new"), [(7, (7, 7)), (7, (14, 5)), (4, (3, 9))])
def test_positions_are_pytorchs_bicubic(old, new):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    grid = rng.normal(size=(old, old, 6)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(grid).permute(2, 0, 1)[None],
        size=new,
        mode="bicubic",
        align_corners=False,
    )
    expected = expected[0].permute(1, 2, 0).reshape(-1, 6).numpy()
    rows = jnp.asarray(grid.reshape(-1, 6))
    found = interpolate_positions(rows, new, prefix_tokens=0)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    if new != (old, old):
        other = jax.image.resize(grid, (*new, 6), "cubic").reshape(-1, 6)
        assert np.abs(other - expected).max() > 1e-2
