"""Draws docs/images/pipeline.svg: a document's way from the web to a model and its evaluation.

    python scripts/studies/draw_pipeline.py

The picture brings its own background and follows the reader's light or dark scheme.
"""

import pathlib

from safelm import cli

WIDTH, HEIGHT, MIDDLE, BOX = 1140, 372, 168, 116  # BOX: the width of a stage

STYLE = """
  :root { --paper: #fbfaf6; --edge: #d9d6cc; --box: #ffffff; --ink: #1a1b1e; --quiet: #5f636b; --line: #a9adb5; }
  @media (prefers-color-scheme: dark) {
    :root { --paper: #15171b; --edge: #33373f; --box: #1f2228; --ink: #eceef1; --quiet: #a4a9b2; --line: #5d636d; }
  }
  .paper { fill: var(--paper); stroke: var(--edge); }
  .box { fill: var(--box); stroke: var(--edge); }
  .flow { fill: none; stroke: var(--line); stroke-width: 2; }
  text { font-family: system-ui, -apple-system, "Segoe UI", sans-serif; font-size: 14px; fill: var(--quiet); }
  .name { font-size: 15px; font-weight: 600; fill: var(--ink); }
  .command { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 13px; }
"""

# Of a harm score from 0 (safe) to 5, as in the reports.
SCORES = ("#2c7a7b", "#8ccfc0", "#f5e3a1", "#f2b267", "#d9643a", "#8f1d2c")

STAGES = (  # left edge, name, two lines about it
    (24, "Web pages", "JSON lines,", "Parquet"),
    (164, "Harm score", "0 safe to", "5 harmful"),
    (580, "Token stores", "mixed at", "exact rates"),
    (720, "Training", "JAX: TPU,", "GPU, CPU"),
    (860, "SafeBeam", "steers away", "from the tag"),
    (1000, "Evaluation", "rates with", "intervals"),
)
TREATMENTS = (  # centre, name, about it, the scores that it takes
    (54, "Kept", "as it is", SCORES[:1]),
    (130, "SafeWeb", "retold safely", SCORES[1:4]),
    (206, "RefuseWeb", "and Moral Education", SCORES[4:]),
    (282, "Tagged", "harm tag between words", SCORES[4:]),
)
TREATMENT_X, TREATMENT_WIDTH = 320, 220
COMMANDS = (  # centre, command
    (82, "safelm"),
    (222, "score"),
    (430, "synthesize"),
    (638, "cache_tasks"),
    (778, "train"),
    (918, "generate, serve"),
    (1058, "evaluate"),
)


def _text(x: int, y: int, words: str, kind: str = "", anchor: str = "middle") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" class="{kind}">{words}</text>'


def _box(x: int, y: int, width: int, height: int) -> str:
    return f'<rect class="box" x="{x}" y="{y}" width="{width}" height="{height}" rx="10"/>'


def _flow(x: int, y: int, to_x: int, to_y: int) -> str:
    half = (x + to_x) // 2
    return f'<path class="flow" d="M{x} {y} C{half} {y} {half} {to_y} {to_x} {to_y}"/>'


def _stage(x: int, name: str, first: str, second: str) -> list[str]:
    centre = x + BOX // 2
    words = [(-14, name, "name"), (10, first, ""), (29, second, "")]
    return [_box(x, MIDDLE - 46, BOX, 92), *(_text(centre, MIDDLE + down, line, kind) for down, line, kind in words)]


def _treatment(y: int, name: str, about: str, scores: tuple[str, ...]) -> list[str]:
    step = 44 // len(scores)
    bars = [
        f'<rect x="{TREATMENT_X + 9}" y="{y - 22 + step * i}" width="6" height="{step}" fill="{color}"/>'
        for i, color in enumerate(scores)
    ]
    left = TREATMENT_X + 26
    words = [_text(left, y - 5, name, "name", "start"), _text(left, y + 16, about, "", "start")]
    return [_box(TREATMENT_X, y - 30, TREATMENT_WIDTH, 60), *bars, *words]


def draw() -> str:
    """The picture as SVG."""
    fan = [
        flow
        for y, *_ in TREATMENTS
        for flow in (_flow(280, MIDDLE, TREATMENT_X, y), _flow(TREATMENT_X + TREATMENT_WIDTH, y, 580, MIDDLE))
    ]
    row = [_flow(x, MIDDLE, x + 24, MIDDLE) for x in (140, 696, 836, 976)]
    scale = [
        f'<rect x="{174 + 16 * i}" y="{MIDDLE + 56}" width="16" height="8" fill="{color}"/>'
        for i, color in enumerate(SCORES)
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
            "<title>From web pages to a model that steers away from harm</title>",
            f"<style>{STYLE}</style>",
            f'<rect class="paper" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="14"/>',
            *fan,
            *row,
            *(shape for stage in STAGES for shape in _stage(*stage)),
            *scale,
            *(shape for treatment in TREATMENTS for shape in _treatment(*treatment)),
            *(_text(x, 350, command, "command") for x, command in COMMANDS),
            "</svg>\n",
        ]
    )


def main() -> None:
    cli.parser("scripts.studies.draw_pipeline", __doc__).parse_args()
    path = pathlib.Path(__file__).parents[2] / "docs" / "images" / "pipeline.svg"
    path.write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
