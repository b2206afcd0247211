"""Style sheet and script of the page."""

SEQUENTIAL = ("#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#e0cc1c")
"""A palette from dark to light for ordered series (the noise levels): evenly spaced colors of viridis."""

STYLE = (
    """
:root { --paper: #fff; --ink: #1c2733; --soft: #5c6b7a; --rule: #dde3e9; --card: #f5f7f9; --warn: #8a4b00;
  --warn-paper: #fff4e0; --c0: #2563c9; --c1: #c2410c; --c2: #0b7d5b; --c3: #8d3fb4; --c4: #a16207;
  --c5: #0e7490;
  --c6: #be185d; --c7: #4d5b6a; }
@media (prefers-color-scheme: dark) { :root { --paper: #12181f; --ink: #e6ebf0; --soft: #9aa8b6;
  --rule: #2c3742;
  --card: #1a222b; --warn: #ffc77a; --warn-paper: #33260f; --c0: #6ea8ff; --c1: #ff9162; --c2: #46c79d;
  --c3: #cf92f0; --c4: #e0b14d; --c5: #56c2dc; --c6: #ff82b4; --c7: #a9b6c3; } }
* { box-sizing: border-box; } [hidden] { display: none !important; }
body { margin: 0 auto; padding: 1rem; max-width: 110rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .3rem 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
p { max-width: 46rem; } .soft, .note, figcaption + p { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .6rem; }
.tile { background: var(--card); border-radius: .4rem; padding: .5rem .7rem; }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .85rem; display: block; }
.first { display: grid; grid-template-columns: minmax(0, 1fr); gap: 1rem 2rem; }
.first .samples { max-width: 44rem; } .samples h2 { margin-top: 0; } #grids img { width: 100%; }
@media (min-width: 60rem) { .first { grid-template-columns: minmax(20rem, 2fr) minmax(0, 3fr); } }
.verdict { font-size: 1.25rem; line-height: 1.4; margin: .2rem 0 1rem; }
.spark { height: 1.6rem; margin: .2rem 0; } .neighbors img { max-width: 40rem; width: 100%; }
details > summary { cursor: pointer; } details > summary h2 { display: inline; margin: 0; }
details { margin: 1rem 0; border-top: 1px solid var(--rule); padding-top: .6rem; }
.warning { background: var(--warn-paper); color: var(--warn); border-radius: .4rem; padding: .6rem .8rem;
  margin: .5rem 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 25rem), 1fr));
  gap: 1.2rem; }
figure { margin: 0; min-width: 0; } figcaption { font-weight: 600; } svg { width: 100%; height: auto;
  display: block; }
.note { font-size: .85rem; margin: .2rem 0; }
.grid { stroke: var(--rule); stroke-width: 1; } .tick { fill: var(--soft); font-size: 12px; }
.label { fill: var(--soft); font-size: 13px; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; } .area { stroke-width: 2; fill-opacity: .18; }
.ideal { stroke: var(--soft); stroke-dasharray: 5 5; stroke-width: 1.5; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size: .85rem; }
.key i { display: inline-block; width: 1rem; height: 0; border-top: 3px solid; margin-right: .35rem;
  vertical-align: middle; }
i.ideal { border-top: 2px dashed var(--soft); }
img { max-width: 100%; image-rendering: pixelated; border-radius: .3rem; display: block; }
input[type=range] { width: 100%; max-width: 40rem; }
.scroll { overflow-x: auto; } caption { text-align: left; font-weight: 600; white-space: normal; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums;
  font-size: .9rem; }
th, td { text-align: right; padding: .2rem .7rem .2rem 0; border-bottom: 1px solid var(--rule);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } .wide td { white-space: normal; text-align: left; }
"""
    + "".join(
        f".s{i} {{ stroke: var(--c{i}); fill: var(--c{i}); }} .line.s{i} {{ fill: none; }} "
        f"i.s{i} {{ border-color: var(--c{i}); }}\n"
        for i in range(8)
    )
    + "".join(
        f".q{i} {{ stroke: {color}; fill: {color}; }} .line.q{i} {{ fill: none; }} "
        f"i.q{i} {{ border-color: {color}; }}\n"
        for i, color in enumerate(SEQUENTIAL)
    )
)

SCRIPT = """
"use strict";
const slider = document.getElementById("step");
if (slider) {
  const pictures = [...document.querySelectorAll("#grids img")];
  const show = () => {
    pictures.forEach((picture, i) => { picture.hidden = i !== Number(slider.value); });
    document.getElementById("shown").textContent = pictures[Number(slider.value)].alt;
  };
  slider.hidden = false;
  slider.addEventListener("input", show);
  show();
}
const level = document.getElementById("level");
if (level) {
  const diagrams = [...document.querySelectorAll("#diagrams > div")];
  const show = () => diagrams.forEach((diagram, i) => { diagram.hidden = i !== Number(level.value); });
  level.hidden = false;
  level.addEventListener("change", show);
  show();
}
document.documentElement.dataset.ready = "yes";
"""
"""Without the script all pictures and diagrams are visible, one below the other."""
