"""Every experiment runs, stops, goes on, and refuses bad input, as a user would see."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ftn_jax.adapt
from ftn_jax import restore_task

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
NAMES = sorted(p.stem for p in (ROOT / "experiments").glob("[a-z]*.py"))
MEASURING = (
    "durability",
    "input_speed",
    "layer_speed",
    "parameters",
    "runs_speed",
    "serving",
    "speed",
)
GENERATING = ("biggan32", "seasons")  # test_seasons.py runs them
# Long, and made of the parts of others: edges, vit_transfer, multi_domain.
SLOW = ("nyud", "clip_transfer", "tiny_darknet")
TRAINING = [name for name in NAMES if name not in (*MEASURING, *GENERATING)]


def load(name):
    return importlib.import_module(f"experiments.{name}")


def run_cli(*args, **options):
    return subprocess.run(
        [sys.executable, "-m", *args],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        **options,
    )


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in TRAINING],
)
def test_tiny_run_writes_everything_and_is_not_repeated(name, tmp_path, monkeypatch):
    module = load(name)
    cfg = replace(module.Config.tiny(), workdir=tmp_path)
    first = module.main(cfg).rows
    on_disk = json.loads((tmp_path / "results.json").read_text())
    assert len(on_disk["rows"]) == len(first) > 1
    assert on_disk["experiment"] == name
    assert (tmp_path / "results.md").exists() and list(tmp_path.glob("*.png"))
    tasks = list((tmp_path / "tasks").glob("*/*/seed*/manifest.json"))
    assert len(tasks) == len(first)
    assert not list((tmp_path / "state").rglob("*.ocdbt"))

    def never(*args, **options):
        raise AssertionError("a finished row was trained again")

    monkeypatch.setattr(ftn_jax.adapt.Adaptation, "run", never)
    assert module.main(cfg).rows == first


def test_interrupted_run_goes_on_to_the_same_result(tmp_path, monkeypatch):
    module = load("multi_domain")
    cfg = replace(module.Config.tiny(), methods=("ftn",), epochs=3)
    whole = module.main(replace(cfg, workdir=tmp_path / "whole")).rows
    real = ftn_jax.adapt.train_batches

    def interrupting(*args, **options):
        for n, batch in enumerate(real(*args, **options)):
            if n == 4:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.5)  # the loop shall meet the signal, not the end
            yield batch

    monkeypatch.setattr(ftn_jax.adapt, "train_batches", interrupting)
    stopped = replace(cfg, workdir=tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        module.main(stopped)
    monkeypatch.setattr(ftn_jax.adapt, "train_batches", real)
    starts = []

    def watching(*args, **options):
        starts.append(options["start_step"])
        return real(*args, **options)

    monkeypatch.setattr(ftn_jax.adapt, "train_batches", watching)
    rows = module.main(stopped).rows
    assert starts[0] > 0
    assert [r.value for r in rows] == [r.value for r in whole]
    assert [r.details for r in rows] == [r.details for r in whole]
    place = Path("tasks", "digits", "ftn_r_2_taps", "seed0")
    shared = module.load_backbone(cfg).shared
    a, b = (restore_task(tmp_path / w / place, shared) for w in ("whole", "stopped"))
    for x, y in zip(jax.tree.leaves(a.task), jax.tree.leaves(b.task), strict=True):
        np.testing.assert_array_equal(x, y)


def test_validation_chooses_the_rate_and_the_test_set_does_not(tmp_path):
    module = load("multi_domain")
    cfg = replace(
        module.Config.tiny(),
        workdir=tmp_path,
        methods=("bn_head",),
        rates=(1e-6, 3e-2),
        seeds=(0, 1),
        epochs=4,
    )
    rows = module.main(cfg).rows
    assert [row.details["rates"]["head"] for row in rows] == [3e-2, 3e-2]
    assert rows[0].details["train_examples"] == 115  # 128 less a tenth held out
    with pytest.raises(ValueError, match="2 candidate rates.*validation"):
        module.main(replace(cfg, validation=0.0, workdir=tmp_path / "none"))


def test_a_domains_own_validation_data_chooses(tmp_path):
    """It is labelled wrongly here: what learns least does best on it."""
    module = load("multi_domain")
    (digits,) = module.load_domains(module.Config.tiny())
    arrays = {}
    for part, n in (("train", 128), ("test", 64), ("val", 64)):
        source = digits.test if part == "test" else digits.train
        images = np.stack([source[i].image for i in range(n)])
        labels = source.labels[:n] + (part == "val")
        arrays |= {f"x_{part}": images, f"y_{part}": labels % 10}
    np.savez(tmp_path / "digits.npz", **arrays)
    cfg = replace(
        module.Config.tiny(),
        data=tmp_path,
        workdir=tmp_path / "runs",
        methods=("bn_head",),
        rates=(1e-1, 1e-6),
        batch_size=8,
        epochs=4,
    )
    (row,) = module.main(cfg).rows
    assert row.details["rates"]["head"] == 1e-6
    assert row.details["train_examples"] == 128  # all: nothing is held out


def test_interrupted_candidates_and_other_seeds_in_between(tmp_path, monkeypatch):
    """A state is found again by what it trains, whatever list it stands in."""
    module = load("multi_domain")
    cfg = replace(
        module.Config.tiny(), methods=("bn_head",), rates=(1e-9, 3e-2, 1e-1), epochs=2
    )
    whole = module.main(replace(cfg, workdir=tmp_path / "whole")).rows
    real, calls = ftn_jax.adapt.fit, []

    def stops_in_the_second(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    stopped = replace(cfg, workdir=tmp_path / "stopped")
    monkeypatch.setattr(ftn_jax.adapt, "fit", stops_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        module.main(stopped)
    monkeypatch.setattr(ftn_jax.adapt, "fit", real)
    shutil.copytree(tmp_path / "stopped", tmp_path / "other")
    (row,) = module.main(stopped).rows
    assert (row.value, row.details) == (whole[0].value, whole[0].details)
    # Another seed chooses first; then this one trains with its choice, from the start.
    rows = module.main(replace(cfg, workdir=tmp_path / "other", seeds=(1, 0))).rows
    rate = rows[0].details["rates"]["head"]
    plain = replace(cfg, workdir=tmp_path / "plain", rates=(rate,))
    (expected,) = module.main(plain).rows
    assert rows[1].seed == 0 and rows[1].details["rates"]["head"] == rate
    assert rows[1].details["test_loss"] == expected.details["test_loss"]


def test_other_data_under_a_known_name_is_refused(tmp_path):
    module = load("multi_domain")
    rng = np.random.default_rng(0)
    arrays = {
        f"{kind}_{part}": rng.integers(0, high, size).astype(dtype)
        for part in ("train", "test")
        for kind, high, size, dtype in (
            ("x", 255, (40, 16, 16, 3), np.uint8),
            ("y", 2, (40,), np.int32),
        )
    }
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "noise.npz", **arrays)
    cfg = replace(
        module.Config.tiny(),
        data=tmp_path / "data",
        workdir=tmp_path / "runs",
        methods=("feature_extractor",),
    )
    module.main(cfg)
    np.savez(
        tmp_path / "data" / "noise.npz", **arrays | {"y_test": 1 - arrays["y_test"]}
    )
    with pytest.raises(ValueError, match="noise / feature extractor measured with"):
        module.main(cfg)


def test_ctrl_c_on_the_command_line(tmp_path):
    args = ("experiments.multi_domain", "--tiny", "--epochs", "100000")
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            *args,
            "--workdir",
            str(tmp_path),
            "--methods",
            "bn_head",
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "results.json").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(10)  # into the training loop
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "goes on from the last saved state" in errors
    assert "Traceback" not in errors
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--backbone", "resnet19"], "resnet19: unknown, known are"),
        (["--weights", "absent.pth"], "absent.pth"),
        (["--data", "absent"], "absent"),
        (["--data", ".ci"], ".ci: no domain, expected"),
        (["--ranks", "0"], "rank must be an integer >= 1, found 0"),
        (["--workdir", "README.md/runs"], "README.md"),
    ],
)
def test_bad_flags_end_with_one_clear_line(flags, message, tmp_path):
    where = [] if "--workdir" in flags else ["--workdir", str(tmp_path)]
    done = run_cli("experiments.multi_domain", "--tiny", *where, *flags)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


def test_image_folders_and_a_picture_that_does_not_decode(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for label in ("cat", "dog"):
            folder = tmp_path / "data" / "pets" / part / label
            folder.mkdir(parents=True)
            for n in range(12):
                pixels = rng.integers(0, 255, (20, 24, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{n}.png")
    bad = tmp_path / "data" / "pets" / "train" / "dog" / "3.png"
    bad.write_bytes(bad.read_bytes()[:60])
    args = ["experiments.multi_domain", "--tiny", "--data", str(tmp_path / "data")]
    args += ["--batch-size", "8", "--methods", "feature_extractor"]
    done = run_cli(*args, "--workdir", str(tmp_path / "stops"))
    assert done.returncode == 2 and str(bad) in done.stderr, done.stderr
    done = run_cli(*args, "--workdir", str(tmp_path / "runs"), "--skip-bad")
    assert done.returncode == 0, done.stderr
    assert str(bad) in done.stderr  # named, not passed over in silence
    row = json.loads((tmp_path / "runs" / "results.json").read_text())["rows"][0]
    assert row["details"]["train_examples"] + 2 == 23  # two held out, one bad


def test_diverging_run_stops_with_its_own_exit_code(tmp_path):
    done = run_cli(
        *("experiments.multi_domain", "--tiny", "--workdir", str(tmp_path)),
        *("--methods", "fine_tuning", "--fine-tuning-rates", "1e30", "--epochs", "20"),
    )
    assert done.returncode == 3, done.stderr
    assert "not finite" in done.stderr and "Traceback" not in done.stderr
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == []


def test_weights_of_another_network_are_refused(tmp_path):
    path = tmp_path / "odd.npz"
    np.savez(path, **{"conv1.weight": np.zeros((3, 3, 3, 3), np.float32)})
    done = run_cli("experiments.multi_domain", "--tiny", "--weights", str(path))
    assert done.returncode == 2 and "odd.npz" in done.stderr
    assert "conv1.weight" in done.stderr


def test_parameters_report_holds_the_published_counts(capsys):
    module = load("parameters")
    module.main(module.Config(json=True))
    report = json.loads(capsys.readouterr().out)
    assert report["rank_1_factors_per_task"] == {
        "resnet18": 8_723,
        "resnet34": 16_291,
        "resnet50": 49_204,
    }
    rows = {(r["setting"], r["method"], r["rank"]): r for r in report["rows"]}
    assert rows["ImageNet-to-Sketch", "ftn", 50]["total"] == 36_021_512
    nyud = [r for r in report["rows"] if r["setting"] == "NYUD"]
    assert [r["papers_reading"] // 10_000 for r in nyud] == [
        1119,
        1123,
        1154,
        1189,
        1224,
    ]
    assert all(r["printed_figure_holds"] for r in nyud)
    wrong = [k for k, r in rows.items() if not r["printed_figure_holds"]]
    assert wrong == [
        ("ImageNet-to-Sketch", "bn_head", 0),
        ("ImageNet-to-Sketch", "ftn", 1),
        ("DomainNet", "ftn", 1),
        ("DomainNet", "ftn", 40),
    ]
    assert all(rows[k]["note"] for k in wrong)
    task = rows["ImageNet-to-Sketch", "ftn", 50]["task"]
    assert task["norms"] == task["statistics"] == 53_120
    assert task["factors"] == 50 * 49_204 and task["head"] == 250 * 2049


def test_parameters_of_any_backbone(capsys):
    module = load("parameters")
    result = module.main(module.Config.tiny())
    assert "cifar_resnet20" in capsys.readouterr().out
    assert [row["method"] for row in result["rows"]] == [
        "bn_head",
        "ftn",
        "fine_tuning",
    ]
    assert result["rows"][-1]["share_of_backbone"] == 1
    with pytest.raises(ValueError, match="unknown"):
        module.main(module.Config(backbone="alexnet"))


@pytest.mark.data
def test_real_weights_on_a_real_domain(data_dir, tmp_path):
    module = load("multi_domain")
    rows = module.main(
        module.Config(
            data=data_dir / "domains",
            domains=("usps",),
            weights=str(data_dir / "weights/cifar_resnet/resnet20-12fca82f.th"),
            methods=("bn_head", "ftn"),
            ranks=(4,),
            rates=(3e-2,),
            workdir=tmp_path,
            max_train=512,
            max_test=500,
            epochs=3,
        )
    ).rows
    accuracy = {row.method: row.value for row in rows}
    assert accuracy["FTN R=4, taps"] > accuracy["BN + head"] > 0.3


@pytest.mark.data
def test_tiny_darknet_weights_are_in_their_places(data_dir):
    """In the right order, the statistics are those of natural images."""
    module = load("tiny_darknet")
    path = data_dir / "weights/tiny_darknet/tiny_darknet_hwio.npz"
    variables = module.load_weights(path)
    assert sum(x.size for x in jax.tree.leaves(variables)) == 1_046_488
    images = np.load(data_dir / "domains/flowers5.npz")["x_test"][:64]
    images = jax.image.resize(
        jnp.asarray(images / 255, jnp.float32), (64, 96, 96, 3), "cubic"
    )
    _, new = module.TinyDarknet().apply(
        variables, images, train=True, mutable=["batch_stats"]
    )
    old, new = variables["batch_stats"], new["batch_stats"]
    for layer in old:
        batch_mean = (new[layer]["mean"] - 0.9 * old[layer]["mean"]) / 0.1
        close = np.corrcoef(batch_mean, old[layer]["mean"])[0, 1]
        assert close > 0.8, (layer, close)


def test_tiny_darknet_refuses_other_weights(tmp_path):
    module = load("tiny_darknet")
    np.savez(tmp_path / "w.npz", **{"conv2d_1.kernel": np.zeros((1, 1, 3, 16))})
    with pytest.raises(ValueError, match=r"conv2d_1.kernel: found \(1, 1, 3, 16\)"):
        module.load_weights(tmp_path / "w.npz")
