"""launch/restart.sh, launch/slurm.sbatch and launch/tpu_vm.sh, run for real with stand-ins for what they start."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
# Arguments that a shell takes apart when they are not quoted all along the way.
ARGUMENTS = ["--config=configs/neo_7b.py", "--workdir=/shared/my runs/$HOME", "--config.eval.sample_prompts=('it''s', \"*\")",
             "--config.phases.main.mixture={'code': 0.5}", "--config.name=a;b|c&d", "--empty="]

# Writes down how it was started, then ends with the next of the codes; "wait" waits for SIGTERM and ends with 75.
TRAINER = """
import json, os, signal, sys, time
folder = os.environ["STAND_IN"]
with open(os.path.join(folder, "starts"), "a") as starts:
    starts.write(json.dumps({"arguments": sys.argv[1:], "passed": os.environ.get("PASSED_ON")}) + "\\n")
number = len(open(os.path.join(folder, "starts")).readlines())
codes = open(os.path.join(folder, "codes")).read().split()
code = codes[min(number, len(codes)) - 1]
if code == "wait":
    def stop(*_):
        print("saved", flush=True)
        sys.exit(75)
    signal.signal(signal.SIGTERM, stop)
    open(os.path.join(folder, f"waiting{number}"), "w").close()
    time.sleep(60)
    sys.exit(1)
if code.startswith("-"):
    os.kill(os.getpid(), -int(code))
sys.exit(int(code))
"""


class StandIn:
    """A folder with a trainer that ends as told, and programs on PATH that the scripts call."""

    def __init__(self, folder: Path):
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir(parents=True)
        (folder / "trainer.py").write_text(TRAINER)
        # A PATH of our own first, so that no real gcloud, srun or scancel of this machine is ever called.
        self.env = {**os.environ, "STAND_IN": str(folder), "PATH": f"{self.bin}:{os.environ['PATH']}",
                    "NEO_RESTART_SECONDS": "0", "NEO_RESTART_MOST_SECONDS": "0"}
        self.program("python3", f'[ "$1" = -m ] && [ "$2" = neo.train ] && shift 2\n'
                                f'exec {shlex.quote(sys.executable)} {shlex.quote(str(folder / "trainer.py"))} "$@"')

    def program(self, name: str, script: str) -> Path:
        path = self.bin / name
        path.write_text(f"#!/usr/bin/env bash\n{script}\n")
        path.chmod(0o755)
        return path

    def codes(self, *codes: object) -> None:
        (self.folder / "codes").write_text(" ".join(map(str, codes)))

    @property
    def starts(self) -> list[list[str]]:
        path = self.folder / "starts"
        return [json.loads(line)["arguments"] for line in path.read_text().splitlines()] if path.exists() else []

    def await_start(self, number: int) -> None:
        wait_for((self.folder / f"waiting{number}").exists)


def wait_for(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@pytest.fixture
def stand_in(tmp_path):
    return StandIn(tmp_path / "stand_in")


def run(command, stand_in, **more):
    env = {**stand_in.env, **more}
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("script", ["restart.sh", "tpu_vm.sh", "slurm.sbatch"])
def test_scripts_parse(script):
    done = subprocess.run(["bash", "-n", LAUNCH / script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (LAUNCH / script).read_text().startswith("#!/usr/bin/env bash\n")
    assert "\nset -" in (LAUNCH / script).read_text()


# restart.sh

@pytest.mark.parametrize("code", [0, 2, 3])
def test_done_wrong_and_needing_a_person_end_it(stand_in, code):
    stand_in.codes(code)
    done = run(["bash", LAUNCH / "restart.sh", "python3", "-m", "neo.train", *ARGUMENTS], stand_in)
    assert done.returncode == code
    assert stand_in.starts == [ARGUMENTS]   # once, and as given


def test_every_other_code_starts_the_same_again(stand_in):
    stand_in.codes(75, 1, 130, 137, -signal.SIGKILL, -signal.SIGABRT, 0)
    done = run(["bash", LAUNCH / "restart.sh", "python3", "-m", "neo.train", *ARGUMENTS], stand_in)
    assert done.returncode == 0
    assert stand_in.starts == [ARGUMENTS] * 7
    said = [line for line in done.stderr.splitlines() if line.startswith("restart.sh: exit code")]
    assert [int(line.split()[3]) for line in said] == [75, 1, 130, 137, 137, 134]


def test_pauses_grow_and_are_bounded(stand_in):
    stand_in.program("sleep", f'echo "$1" >> {shlex.quote(str(stand_in.folder / "pauses"))}')
    stand_in.codes(1, 1, 1, 1, 1, 1, 0)
    run(["bash", LAUNCH / "restart.sh", "python3"], stand_in, NEO_RESTART_SECONDS="10", NEO_RESTART_MOST_SECONDS="100")
    assert (stand_in.folder / "pauses").read_text().split() == ["10", "20", "40", "80", "100", "100"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_ends_it(stand_in, number):
    stand_in.codes(1, "wait")
    # As from a terminal: SIGINT is not ignored. TERM is what the stand-in answers; Ctrl-C ends Python by itself.
    process = subprocess.Popen(["bash", LAUNCH / "restart.sh", "python3"], env=stand_in.env, stderr=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True, start_new_session=True)
    stand_in.await_start(2)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    if number == signal.SIGTERM:
        assert process.returncode == 75 and "saved" in out
    else:
        assert process.returncode in (1, 130), err
    assert f"stopped by {number.name}" in err and len(stand_in.starts) == 2


def test_a_signal_between_two_starts_ends_it(stand_in):
    stand_in.codes(75)
    process = subprocess.Popen(["bash", LAUNCH / "restart.sh", "python3"], stderr=subprocess.PIPE, text=True,
                               env={**stand_in.env, "NEO_RESTART_SECONDS": "50", "NEO_RESTART_MOST_SECONDS": "50"})
    assert "in 50 s" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 75 and len(stand_in.starts) == 1


def test_restart_without_a_command_is_refused(stand_in):
    done = run(["bash", LAUNCH / "restart.sh"], stand_in)
    assert done.returncode == 2 and "usage" in done.stderr


# slurm.sbatch

@pytest.fixture
def slurm(stand_in):
    """srun runs one task; scancel sends its signal to it; both, and scontrol, write down how they were called."""
    note = f'printf "%s\\n" "$(basename "$0") $*" >> {shlex.quote(str(stand_in.folder / "called"))}'
    stand_in.program("srun", f'{note}\nwhile [ "${{1#-}}" != "$1" ]; do shift; done\n'
                             f'"$@" &\necho $! > {shlex.quote(str(stand_in.folder / "task"))}\n'
                             'trap "exit 137" TERM   # as srun answers it\nwait $!')
    stand_in.program("scancel", f'{note}\nkill -s "${{1#--signal=}}" "$(cat {shlex.quote(str(stand_in.folder / "task"))})"')
    stand_in.program("scontrol", note)
    stand_in.env.update(SLURM_JOB_ID="77", SLURM_SUBMIT_DIR=str(stand_in.folder))
    return stand_in


def called(slurm: StandIn) -> list[str]:
    return (slurm.folder / "called").read_text().splitlines()


def test_slurm_starts_what_it_was_given(slurm):
    slurm.codes(0)
    done = run(["bash", LAUNCH / "slurm.sbatch", *ARGUMENTS], slurm)
    assert done.returncode == 0 and slurm.starts == [ARGUMENTS], done.stderr
    assert not [line for line in called(slurm) if line.startswith(("scontrol", "scancel"))]


@pytest.mark.parametrize(("code", "again"), [(0, False), (2, False), (3, False), (75, True), (1, True), (130, True),
                                             (137, True)])
def test_slurm_queues_again_what_may_go_on(slurm, code, again):
    slurm.codes(code)
    done = run(["bash", LAUNCH / "slurm.sbatch", *ARGUMENTS], slurm)
    assert done.returncode == code
    assert ("scontrol requeue 77" in called(slurm)) == again


def test_slurm_stops_queueing_at_the_limit(slurm):
    slurm.codes(75)
    done = run(["bash", LAUNCH / "slurm.sbatch"], slurm, SLURM_RESTART_COUNT="3", NEO_RESTARTS="3")
    assert "scontrol requeue 77" not in called(slurm) and "NEO_RESTARTS" in done.stdout


@pytest.mark.parametrize(("number", "again"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_slurm_tells_the_tasks_before_the_limit_and_when_stopped(slurm, number, again):
    """USR1 comes before the time limit, TERM from who wants it to end. Both reach the tasks, which save."""
    slurm.codes("wait")
    process = subprocess.Popen(["bash", LAUNCH / "slurm.sbatch", *ARGUMENTS], env=slurm.env, stdout=subprocess.PIPE, text=True)
    slurm.await_start(1)
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 75 and "saved" in out
    assert "scancel --signal=TERM 77" in called(slurm)
    assert ("scontrol requeue 77" in called(slurm)) == again


def test_slurm_outside_a_job_is_refused(stand_in):
    stand_in.env.pop("SLURM_JOB_ID", None)
    done = run(["bash", LAUNCH / "slurm.sbatch", "--config=neo_7b"], stand_in)
    assert done.returncode == 2 and "sbatch" in done.stderr


def test_slurm_asks_for_what_it_needs():
    options = [line.removeprefix("#SBATCH ") for line in (LAUNCH / "slurm.sbatch").read_text().splitlines()
               if line.startswith("#SBATCH")]
    assert {"--requeue", "--open-mode=append"} <= set(options)
    assert any(option.startswith("--signal=B:USR1@") for option in options)
    tasks = next(option for option in options if option.startswith("--ntasks-per-node=")).partition("=")[2]
    gpus = next(option for option in options if option.startswith("--gpus-per-node=")).partition("=")[2]
    assert tasks == gpus   # one process per GPU


# tpu_vm.sh

@pytest.fixture
def tpu(stand_in):
    """gcloud, which runs the command of each worker on this machine, in a home folder of its own; two workers a TPU."""
    homes = stand_in.folder / "homes"
    stand_in.program("gcloud", f"""
echo "$*" | head -n 1 >> {shlex.quote(str(stand_in.folder / "called"))}
[ "$1 $2 $3" = "compute tpus tpu-vm" ] || exit 9
verb=$4; shift 4
words=(); worker=; command=
for word; do
    case $word in
        --worker=*) worker=${{word#*=}} ;;
        --command=*) command=${{word#*=}} ;;
        --zone=* | --project=*) ;;
        *) words+=("$word") ;;
    esac
done
workers=$worker; [ "$worker" = all ] && workers="0 1"
for worker in $workers; do
    if [ "$verb" = scp ]; then
        home={shlex.quote(str(homes))}/${{words[1]%%:*}}-$worker; mkdir -p "$home"
        cp "${{words[0]}}" "$home/${{words[1]#*:}}" || exit 1
    else
        home={shlex.quote(str(homes))}/${{words[0]}}-$worker; mkdir -p "$home"
        (cd "$home" && HOME=$home env -u PASSED_ON bash -c "$command") || exit 1
    fi
done""")
    stand_in.env.update(TPU_NAME="pod", ZONE="here-1a", NEO_PYTHON="stand-in-python")
    # `python -m venv DIR` leaves an interpreter that is the stand-in trainer, and knows `-m pip`.
    stand_in.program("stand-in-python", f"""
[ "$1" = -c ] && exit 0
mkdir -p "$3/bin"
printf '#!/usr/bin/env bash\\n[ "$2" = pip ] && {{ echo "$PWD $*" >> {stand_in.folder}/pip; exit 0; }}\\n[ "$1" = --version ] && exit 0\\nexec {stand_in.bin}/python3 "$@"\\n' > "$3/bin/python"
chmod +x "$3/bin/python\"""")   # noqa: E501
    stand_in.homes = homes
    yield stand_in
    for pid in homes.glob("*/neo-train.pid"):
        subprocess.run(["kill", "-KILL", "--", f"-{pid.read_text().strip()}"], capture_output=True, check=False)


def tpu_vm(tpu, *arguments, **more):
    return run(["bash", LAUNCH / "tpu_vm.sh", *arguments], tpu, **more)


def test_tpu_vm_from_install_to_clean(tpu):
    tpu.codes("wait")
    done = tpu_vm(tpu, "install")
    assert done.returncode == 0, done.stderr
    for worker in ("pod-0", "pod-1"):
        assert (tpu.homes / worker / "neo/launch/restart.sh").exists() and (tpu.homes / worker / "neo/neo/cli.py").exists()
        assert not (tpu.homes / worker / "neo/.git").exists()
    assert len((tpu.folder / "pip").read_text().splitlines()) == 2 and "neo[tpu,cloud]" in (tpu.folder / "pip").read_text()

    done = tpu_vm(tpu, "start", *ARGUMENTS)
    assert done.returncode == 0 and done.stdout.count("started") == 2, done.stderr
    wait_for(lambda: len(tpu.starts) == 2)
    assert tpu.starts == [ARGUMENTS, ARGUMENTS]
    tpu.await_start(2)
    assert tpu_vm(tpu, "status").stdout.count("runs, process") == 2
    again = tpu_vm(tpu, "start", *ARGUMENTS)
    assert again.returncode != 0 and "runs already" in again.stderr
    assert tpu_vm(tpu, "clean").returncode != 0

    done = tpu_vm(tpu, "stop")
    assert done.returncode == 0 and done.stdout.count("has ended") == 2, done.stdout + done.stderr
    assert "saved" in (tpu.homes / "pod-0/neo-train.log").read_text()
    assert "exit code 75" in (tpu.homes / "pod-1/neo-train.log").read_text()
    assert tpu_vm(tpu, "status").stdout.count("has ended") == 2
    assert len(tpu.starts) == 2   # stopped means stopped

    assert tpu_vm(tpu, "clean").returncode == 0
    assert not list((tpu.homes / "pod-0").iterdir())
    asked = [line for line in called(tpu) if "compute" in line]
    assert asked and all(line.startswith("compute tpus tpu-vm ") and "--zone=here-1a" in line for line in asked)


def test_tpu_vm_starts_every_slice(tpu):
    tpu.codes(0)
    assert tpu_vm(tpu, "install", TPU_NAME="s0 s1", PROJECT="mine").returncode == 0
    assert tpu_vm(tpu, "start", "--config=neo_7b", TPU_NAME="s0 s1", PROJECT="mine").returncode == 0
    wait_for(lambda: len(tpu.starts) == 4)
    assert {folder.name for folder in tpu.homes.iterdir()} == {"s0-0", "s0-1", "s1-0", "s1-1"}
    assert all("--project=mine" in line for line in called(tpu))


def test_tpu_vm_passes_variables_on(tpu):
    tpu.codes(0)
    tpu_vm(tpu, "install")
    value = "--a=1 --b='x y' $HOME"
    assert tpu_vm(tpu, "start", "--config=neo_7b", PASSED_ON=value, NEO_PASS="PASSED_ON").returncode == 0
    wait_for(lambda: len(tpu.starts) == 2)
    lines = (tpu.folder / "starts").read_text().splitlines()
    assert [json.loads(line)["passed"] for line in lines] == [value] * 2
    refused = tpu_vm(tpu, "start", "--config=neo_7b", NEO_PASS="NO_SUCH_VARIABLE")
    assert refused.returncode == 2 and "NO_SUCH_VARIABLE" in refused.stderr


@pytest.mark.parametrize(("arguments", "missing", "says"), [
    ((), "", "usage"), (("begin",), "", "usage"), (("start",), "", "--config="), (("status",), "TPU_NAME", "TPU_NAME"),
    (("status",), "ZONE", "ZONE")])
def test_tpu_vm_refuses_what_is_incomplete(tpu, arguments, missing, says):
    tpu.env.pop(missing, None)
    done = tpu_vm(tpu, *arguments)
    assert done.returncode == 2 and says in done.stderr and not (tpu.folder / "called").exists()


def test_tpu_vm_start_needs_an_install(tpu):
    done = tpu_vm(tpu, "start", "--config=neo_7b")
    assert done.returncode != 0 and "launch/tpu_vm.sh install" in done.stderr
