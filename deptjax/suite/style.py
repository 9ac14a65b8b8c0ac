"""The look of a suite's report: one style sheet, light and dark, for a phone and for a wide screen.

The colours of the methods are told apart by people who see no red, no green or no blue (after Okabe and Ito, Color
Universal Design, 2008, made darker on white and lighter on black); lines differ in their dashes as well.
"""

from __future__ import annotations

METHOD_COLOURS = 8  # as many classes m0, m1, ... as there are below

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --text: #1b1f24; --soft: #59636e; --rule: #d8dee4;
  --raised: #f5f7f9; --best: #dff1e4; }
.m0 { --ink: #0072b2; --dash: none; }      .m1 { --ink: #c65102; --dash: 7 3; }
.m2 { --ink: #00805f; --dash: 2 2.5; }     .m3 { --ink: #a8327c; --dash: 9 3 2 3; }
.m4 { --ink: #8f6b00; --dash: 12 4; }      .m5 { --ink: #3584b8; --dash: 4 2; }
.m6 { --ink: #5a5a5a; --dash: 1 2.5; }     .m7 { --ink: #7a4b2a; --dash: 5 2 1 2 1 2; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171b; --text: #e8ebee; --soft: #a0a9b3; --rule: #363d45; --raised: #1d2126; --best: #1d4029; }
  .m0 { --ink: #58b0ee; } .m1 { --ink: #ff8f47; } .m2 { --ink: #35c79d; } .m3 { --ink: #e88bc3; }
  .m4 { --ink: #ecc23f; } .m5 { --ink: #a5d9fb; } .m6 { --ink: #bdbdbd; } .m7 { --ink: #cf9f78; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--text); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 28px 20px 64px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .7rem; padding-bottom: .3rem; border-bottom: 1px solid var(--rule); }
p { margin: .5rem 0; max-width: 75ch; }
.soft, figcaption, .legend, .notes { color: var(--soft); }
.notes { font-size: .875rem; }
.failed { border-left: 3px solid #c65102; padding-left: 12px; overflow-wrap: anywhere; }
.charts { display: grid; gap: 26px 34px; margin-top: 1.3rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); }
.curves { grid-template-columns: repeat(auto-fill, minmax(min(100%, 430px), 1fr)); }
figure { margin: 0; min-width: 0; max-width: 520px; }
figcaption { font-size: .875rem; margin-bottom: .5rem; overflow-wrap: anywhere; }
figcaption b { color: var(--text); font-weight: 600; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--soft); font-size: 12.5px; font-variant-numeric: tabular-nums; }
svg .name, svg .value { fill: var(--text); }
.grid, .axis { stroke: var(--rule); stroke-width: 1; fill: none; }
.axis { stroke: var(--soft); }
.mean { fill: none; stroke: var(--ink); stroke-width: 2.2; stroke-dasharray: var(--dash); stroke-linejoin: round; }
.seed { fill: none; stroke: var(--ink); stroke-width: 1; opacity: .35; stroke-linejoin: round; }
.mark { fill: var(--ink); }
.bar { fill: var(--ink); opacity: .72; }
.one { fill: var(--paper); stroke: var(--text); stroke-width: 1; }
.error { fill: none; stroke: var(--text); stroke-width: 1.5; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 4px 22px; margin: 0 0 1rem; padding: 0;
  font-size: .875rem; }
.legend li { display: flex; align-items: center; gap: 8px; }
.legend svg { width: 34px; height: 10px; }
.scroll { overflow-x: auto; margin: 0 0 .8rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 11px; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
thead th { color: var(--soft); font-weight: 500; white-space: normal; vertical-align: bottom; }
tbody th { font-weight: 600; position: sticky; left: 0; background: var(--paper); }
.word { text-align: left; }
td.told { white-space: normal; text-align: left; min-width: 15rem; }
.best { background: var(--best); font-weight: 600; }
pre { background: var(--raised); padding: 12px 14px; border-radius: 6px; overflow-x: auto; font-size: .8125rem;
  margin: .5rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: .3rem 0; }
summary { cursor: pointer; overflow-wrap: anywhere; }
@media print { .charts { break-inside: avoid; } .scroll { overflow: visible; } }
"""
