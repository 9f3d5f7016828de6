"""The command line: exit codes, one line for a user's mistake, help without heavy imports."""

import signal
import subprocess
import sys
import types
from importlib.metadata import version

import pytest

from pipelines import cli, commands
from pipelines.config import UserError, from_yaml, load_config, to_yaml


@pytest.fixture(autouse=True)
def keep_signals():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def stage(monkeypatch):
    """Stands in for `pipelines.train`, and records what it is asked to do."""
    calls: list[tuple] = []
    fake = types.SimpleNamespace(
        check=lambda config: calls.append(("check", config)) or ["would train", "would save"],
        run=lambda config, *rest, **options: calls.append(("run", config, rest, options)),
        calls=calls,
    )
    for name in ("train", "sample"):
        monkeypatch.setitem(sys.modules, f"pipelines.{name}", fake)
    return fake


def test_runs_the_stage_with_the_resolved_configuration(stage) -> None:
    assert cli.main(["train", "--preset", "demo", "seed=3", "--run", "runs/x"]) == 0
    (action, config, _, _) = stage.calls[0]
    assert action == "run"
    assert (config.seed, config.run, config.preset) == (3, "runs/x", "demo")


def test_options_and_overrides_mix_in_any_order(stage) -> None:
    assert cli.main(["train", "seed=3", "--preset", "demo", "train.num_images=9", "--dry-run"]) == 0
    config = stage.calls[0][1]
    assert (config.seed, config.train.num_images) == (3, 9)


def test_dry_run_checks_and_does_nothing(stage, capsys) -> None:
    assert cli.main(["train", "--preset", "demo", "--dry-run"]) == 0
    assert [call[0] for call in stage.calls] == ["check"]
    assert capsys.readouterr().out == "would train\nwould save\n"


def test_print_config_prints_yaml_that_loads(stage, capsys) -> None:
    assert cli.main(["train", "--preset", "demo", "seed=4", "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert from_yaml(printed) == load_config("demo", ["seed=4"])
    assert stage.calls == []
    assert cli.main(["config", "--preset", "demo", "seed=4"]) == 0
    assert capsys.readouterr().out == printed


def test_paths_are_text_whatever_they_look_like(stage) -> None:
    assert cli.main(["train", "--preset", "demo", "--run", "007", "--dataset", "a: [b"]) == 0
    config = stage.calls[0][1]
    assert (config.run, config.dataset) == ("007", "a: [b")


def test_without_preset_the_configuration_of_the_run_is_used(stage, tmp_path) -> None:
    saved = load_config("demo", ["seed=5", "run=elsewhere"])
    (tmp_path / "config.yaml").write_text(to_yaml(saved))
    arguments = ["a red apple", "--run", str(tmp_path), "--seed", "7", "sample.num_steps=9"]
    assert cli.main(["sample", *arguments]) == 0
    (_, config, rest, _) = stage.calls[0]
    assert rest == ("a red apple",)
    assert (config.seed, config.run, config.sample.num_steps) == (7, str(tmp_path), 9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "give --preset NAME (one of demo,"),
        (["train", "--run", "nowhere"], "run='nowhere': no nowhere/config.yaml"),
        (["train", "--preset", "nope"], "preset='nope' must be one of demo,"),
        (["train", "--preset", "demo", "seed=x"], "seed: Value 'x'"),
        (
            ["sample", "x", "--run", "x", "--size", "32"],
            "--size is of pictures that a server draws",
        ),
        (
            [
                "sample",
                "x",
                "sample.num_steps=2",
                "--server",
                "http://x",
                "--run",
                "y",
                "--dry-run",
            ],
            "--server draws with the server's model, without a configuration: leave out "
            "sample.num_steps=2, --run (--num-steps,",
        ),
        (["sample", "x", "--server", ""], "server='' must be a URL such as http://"),
        (["sample", "a", "red", "apple", "--run", "x"], "'red': put the whole prompt in quotes"),
        (["train", "--run", "x", "--config", "y.yaml"], "--config y.yaml is read with --preset"),
        (["train", "--run", "s4://x/y"], "'s4://x/y/config.yaml': Protocol not known: s4"),
        (["sample", "x", "--preset", "demo", "--guidance", "inf"], "sample.guidance=inf must be"),
        (["train", "--preset", "demo", "--run", "x/../y", "--dataset", "y"], "run='x/../y' must"),
        (["ablate", "e3", "--data", "nope", "--dry-run"], "--data nope: there is no such folder"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(capsys, arguments, message) -> None:
    assert cli.main(arguments) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {message}")
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "Is a directory"),
        (b"\xff", "can't decode byte 0xff"),
        (b"{}", "preset: missing"),
    ],
)
def test_a_runs_configuration_that_cannot_be_used_is_told(
    tmp_path, capsys, content, message
) -> None:
    path = tmp_path / "config.yaml"
    path.mkdir() if content is None else path.write_bytes(content)
    assert cli.main(["config", "--run", str(tmp_path)]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "config.yaml" in shown
    assert shown.count("\n") == 1
    assert cli.main(["config", "--run", str(path / "more")]) == 2  # a file's name for a directory's
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("base: {}\npresets:\n", "presets must hold names"),
        ("base: {}\npresets: 3\n", "presets must hold names"),
        ("base: {}\npresets: [1]\n", "presets must hold names"),
    ],
)
def test_a_configuration_file_without_presets_is_told(tmp_path, capsys, content, message) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    assert cli.main(["config", "--preset", "demo", "--config", str(path)]) == 2
    assert f"error: config file {path}: {message}" in capsys.readouterr().err


def test_what_an_object_store_refuses_is_one_line(stage, capsys) -> None:
    from botocore.exceptions import NoCredentialsError

    def fail(config):
        raise NoCredentialsError

    stage.run = fail
    assert cli.main(["train", "--preset", "demo"]) == 1
    assert capsys.readouterr().err == "error: object store: Unable to locate credentials\n"


def test_the_version_is_that_of_the_package(capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"layered-diffusion-ray {version('layered-diffusion-ray')}\n"


def test_a_mistake_found_inside_a_ray_task_is_told_without_its_traceback(stage, capsys) -> None:
    class Wrapped(UserError):
        cause = UserError("data.train_images='x': no such folder")

    def fail(config):
        raise Wrapped("Traceback (most recent call last): ...")

    stage.run = fail
    assert cli.main(["train", "--preset", "demo"]) == 2
    assert capsys.readouterr().err == "error: data.train_images='x': no such folder\n"


@pytest.mark.parametrize(
    "option", ["--preset=demo", "--run=x", "--dataset=x", "--config=x", "--print-config"]
)
def test_a_server_draws_without_a_configuration(capsys, option) -> None:
    assert cli.main(["sample", "a cat", "--server", "http://x", option]) == 2
    assert f"leave out {option.partition('=')[0]} (" in capsys.readouterr().err


def test_ctrl_c_is_quiet_and_exits_130(stage, capsys) -> None:
    def interrupt(config):
        raise KeyboardInterrupt

    stage.run = interrupt
    assert cli.main(["train", "--preset", "demo"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_sigterm_leaves_by_an_exception(stage) -> None:
    stage.run = lambda config: signal.raise_signal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--preset", "demo"])
    assert caught.value.code == 143


def test_a_failure_is_not_hidden(stage) -> None:
    def fail(config):
        raise RuntimeError("disk on fire")

    stage.run = fail
    with pytest.raises(RuntimeError, match="disk on fire"):
        cli.main(["train", "--preset", "demo"])


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train", "--prest", "demo"], ["sample"]])
def test_wrong_usage_exits_2(capsys, arguments) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: layered" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["--help", *commands.STAGES])
def test_help_is_for_everyone(capsys, name) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([name] if name == "--help" else [name, "--help"])
    assert caught.value.code == 0
    assert "layered" in capsys.readouterr().out


def test_help_and_a_bad_preset_import_neither_ray_nor_the_stage() -> None:
    script = (
        "import sys; from pipelines import cli\n"
        "try: cli.main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules\n"
        "assert cli.main(['train', '--preset', 'nope']) == 2\n"
        "assert not {'ray', 'pipelines.train'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
