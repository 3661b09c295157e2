"""`--output=gs://...` of every command: in a bucket, or an error that says what to do; never a folder called `gs:`."""

import re

import forked_commands
import gcs_server
import pytest
from forked_commands import ROOT

from safelm import __main__ as console

URL = f"gs://{gcs_server.BUCKET}/somewhere"
LOCAL_ONLY = "is written to this machine only"
TO_BUCKETS = (
    "score",
    "annotate",
    "report_card",
    "select",
    "synthesize",
    "train_classifier",
    "train_tokenizer",
    "cache_tasks",
    "aot",
)
MORE = {  # what a command needs to come to its output, beyond the flags that its parser asks for
    "annotate": ["--join", "--annotations=x"],
    "calibrate_knob": ["--kind=refusal", "--max_over_refusal=0.1"],
    "canaries": ["--plant"],
    "dashboard": ["x"],
    "ladder": [f"--config={ROOT}/configs/ladder.py"],
    "synthesize": ["--kind=safeweb"],
    "train_classifier": ["--data=x"],
}
SUBCOMMANDS = ("report", "calibrate", "audit", "train_judge", "capability", "monitors")
KEYS = [*((name,) for name in console.COMMANDS), *(("evaluate", verb) for verb in SUBCOMMANDS)]
KEYS += [("aot.slices",), ("ladder.prepare_real_text",), ("safety.synthesis.review",), ("safety.scoring.agreement",)]
NAMES = [" ".join(key) for key in KEYS]


@pytest.fixture(scope="module")
def endings(tmp_path_factory):
    """How each command with `--output` ended, by name, and the folder where it ran."""
    folder, done = tmp_path_factory.mktemp("here"), {}
    extra = {key: MORE.get(key[0], []) for key in KEYS}
    imports = ("seqio", "safelm.train.program")
    with gcs_server.emulator() as endpoint:
        place = {"STORAGE_EMULATOR_HOST": endpoint, "NO_PROXY": "127.0.0.1", "NO_GCE_CHECK": "true"}
        place |= {"GOOGLE_CLOUD_PROJECT": "p", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
        names = list(KEYS)
        while names:
            commands = [(f"safelm.{key[0]}", *key[1:], f"--output={URL}", *extra[key]) for key in names]
            ended = forked_commands.run_all(commands, imports=imports, cwd=folder, **place)
            done |= zip(names, ended, strict=True)
            names = [key for key in names if _missing(done[key].output)]
            extra |= {key: [*extra[key], *(f"{flag}=x" for flag in _missing(done[key].output))] for key in names}
    return {" ".join(key): each for key, each in done.items()}, folder


def _missing(output: str) -> list[str]:
    if one := re.search(r"one of the arguments (--\w+) .*is required", output):
        return [one[1]]
    found = re.search(r"the following arguments are required: (.*)", output)
    return re.findall(r"--\w+", found[1]) if found else []


@pytest.mark.parametrize("name", NAMES)
def test_an_output_in_a_bucket_is_written_there_or_refused(name, endings):
    done, folder = endings
    if re.search("unrecognized arguments: --output=|Unknown command line flag 'output'", done[name].output):
        assert name not in TO_BUCKETS
        return
    if name in TO_BUCKETS:
        assert LOCAL_ONLY not in done[name].output and "usage:" not in done[name].output
    else:
        assert done[name].code == 2, done[name].output
        line = done[name].output.strip().splitlines()[-1]
        assert re.search(rf"--output(_path)?={URL}: {LOCAL_ONLY}: .* \(gcloud storage cp", line), line
    assert not [path.name for path in folder.iterdir() if path.name.startswith("gs:")]
