"""The style sheet of every page: colours of both schemes, widths from 360 px up, print.

The series colours are those of Okabe and Ito (told apart with any colour vision), darkened or lightened until they have
a contrast of at least 3:1 with the card behind them; text has at least 4.5:1.
"""

STYLE = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --text: #1b2330; --muted: #566072; --line: #dde2ea; --grid: #e6eaf0;
  --axis: #8993a4;
  --accent: #0060a0; --warn: #8a4600; --warn-back: #fff4e5; --good: #00664b; --good-back: #e5f5ef;
  --s0: #0072b2; --s1: #d55e00; --s2: #00805c; --s3: #a8518a; }
@media (prefers-color-scheme: dark) { :root {
  --page: #11151c; --card: #191f29; --text: #e7ebf1; --muted: #a5b0c0; --line: #2d3644; --grid: #29313e;
  --axis: #77839a;
  --accent: #7cc4f5; --warn: #ffc078; --warn-back: #33270f; --good: #6fdcb4; --good-back: #10302a;
  --s0: #56b4e9; --s1: #f58f3c; --s2: #2fc49a; --s3: #e39cc6; } }
*, *::before, *::after { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--text); overflow-wrap: anywhere;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main, footer { max-width: 1120px; margin: 0 auto; padding: 0 24px; }
header { padding: 40px 0 4px; }
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 10px; text-wrap: balance; }
h2 { font-size: 1.3rem; line-height: 1.3; letter-spacing: -0.01em; margin: 44px 0 12px; }
h3 { font-size: 1rem; margin: 0 0 4px; }
.lead { font-size: 1.125rem; max-width: 46em; margin: 0; }
.intro, figcaption, .note, footer { color: var(--muted); }
.intro { margin: -8px 0 14px; max-width: 46em; }
code { font: 0.92em/1.4 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 24px 0 0;
  padding: 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px 11px; }
.tile dt { color: var(--muted); font-size: 0.85rem; }
.tile dd { margin: 0; }
.tile .value { font-size: 1.6rem; font-weight: 650; line-height: 1.3; letter-spacing: -0.01em;
  font-variant-numeric: tabular-nums; }
.tile .note { font-size: 0.85rem; line-height: 1.35; }
p.note { margin: 12px 0; }
.notice { background: var(--warn-back); border-left: 4px solid var(--warn); border-radius: 6px; margin: 20px 0 0;
  padding: 10px 16px; }
.notice strong { color: var(--warn); }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); gap: 16px; }
figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin: 0;
  padding: 14px 16px 12px;
  container-type: inline-size; display: flex; flex-direction: column; min-width: 0; }
figcaption { font-size: 0.875rem; line-height: 1.45; margin-top: 6px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; list-style: none; margin: 2px 0 6px; padding: 0;
  font-size: 0.875rem; }
.legend li { display: flex; align-items: center; gap: 7px; }
.legend svg { flex: none; }
.chart { display: block; width: 100%; height: auto; font-size: 14.5px; font-variant-numeric: tabular-nums; }
@container (min-width: 350px) { .chart { font-size: 12.5px; } }
@container (min-width: 440px) { .chart { font-size: 10.5px; } }
.chart text { fill: var(--muted); paint-order: stroke; stroke: var(--card); stroke-width: 3px; }
.chart text.strong { fill: var(--text); font-weight: 600; }
.grid, .axis, .zero, .line, .whisker, .whisker-halo, .reference { vector-effect: non-scaling-stroke; fill: none; }
.grid { stroke: var(--grid); } .axis, .zero { stroke: var(--axis); }
.line { stroke-width: 2; stroke-linejoin: round; stroke-linecap: butt; }
.line.s0 { stroke: var(--s0); } .line.s1 { stroke: var(--s1); stroke-dasharray: 8 4; }
.line.s2 { stroke: var(--s2); stroke-dasharray: 2.5 3; } .line.s3 { stroke: var(--s3);
  stroke-dasharray: 10 3 2.5 3; }
.s0 { --colour: var(--s0); } .s1 { --colour: var(--s1); } .s2 { --colour: var(--s2); } .s3 { --colour: var(--s3); }
.dot, .bar { fill: var(--colour); } .band { fill: var(--colour, var(--axis)); fill-opacity: 0.16; }
.line.raw { stroke-width: 1; stroke-opacity: 0.38; stroke-dasharray: none; } .dot.raw { fill-opacity: 0.38; }
.whisker { stroke: var(--text); stroke-width: 2; } .whisker-halo { stroke: var(--card); stroke-width: 5; }
.reference { stroke: var(--text); stroke-width: 1.5; stroke-dasharray: 4 4; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; }
th, td { text-align: left; vertical-align: top; padding: 6px 16px 6px 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; } tbody th { font-weight: 400; }
.numbers td, .numbers th { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
.numbers th:first-child { text-align: left; }
details { background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin: 16px 0 0;
  padding: 0 16px; }
summary { cursor: pointer; font-weight: 600; padding: 12px 0; }
details > .scroll, details > .sample:last-child { margin-bottom: 16px; }
.sample { background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin: 0 0 16px;
  overflow: hidden; break-inside: avoid; }
.sample h3 { color: var(--muted); font-size: 0.8rem; font-weight: 600; letter-spacing: 0.02em; margin: 0 0 4px; }
.sample > div, .answers > div { padding: 12px 16px 14px; min-width: 0; }
.answers { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); padding: 0 !important;
  border-top: 1px solid var(--line); }
.answers > div + div { border-left: 1px solid var(--line); }
.answers > .chosen { background: var(--good-back); } .answers > .chosen h3 { color: var(--good); }
.text { white-space: pre-wrap; unicode-bidi: plaintext; max-height: 26rem; overflow-y: auto; }
.empty { color: var(--muted); font-style: italic; }
.role { color: var(--muted); font-size: 0.8rem; } .text + .role, .empty + .role { margin-top: 8px; }
.badge { display: inline-block; border: 1px solid var(--line); border-radius: 99px; color: var(--muted);
  font-size: 0.8rem; padding: 1px 10px; margin: 8px 8px 0 0; }
.badge.warn { border-color: currentColor; color: var(--warn); }
.tokens { display: flex; flex-wrap: wrap; gap: 4px; } .answer { border-top: 1px solid var(--line); }
.token { display: inline-flex; flex-direction: column; align-items: center; border-radius: 5px; padding: 1px 5px;
  font: 0.9rem/1.3 ui-monospace, "SF Mono", Menlo, Consolas, monospace; white-space: pre-wrap; min-width: 0;
  background: color-mix(in srgb, var(--s0) var(--shade), var(--card)); box-shadow: inset 0 0 0 1px var(--line); }
.token small { color: var(--muted); font-size: 0.7rem; line-height: 1.1; }
.l0 { --shade: 0%; } .l1 { --shade: 9%; } .l2 { --shade: 18%; } .l3 { --shade: 27%; } .l4 { --shade: 36%; }
.token.given { background: none; box-shadow: none; } .l3 small, .l4 small { color: var(--text); }
.key { align-items: baseline; color: var(--muted); font-size: 0.9rem; }
.key .token { color: var(--text); }
.sample > details { border: 0; border-top: 1px solid var(--line); border-radius: 0; margin: 0; }
.frames { list-style: none; margin: 0; padding: 0 0 12px; } .frames li { padding: 6px 0; }
.frames .text { font: 0.9rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
mark { background: color-mix(in srgb, var(--s0) 30%, var(--card)); color: inherit; border-radius: 3px; }
footer { font-size: 0.85rem; padding-top: 40px; padding-bottom: 40px; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
@media (max-width: 640px) {
  main, footer { padding-left: 14px; padding-right: 14px; } header { padding-top: 24px; }
  h1 { font-size: 1.5rem; } .lead { font-size: 1.05rem; } h2 { margin-top: 34px; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 10px; } .tile { padding: 10px 12px;
  } .tile .value { font-size: 1.3rem; }
  figure { padding: 12px; } details { padding: 0 12px; }
  .answers { grid-template-columns: minmax(0, 1fr); }
  .answers > div + div { border-left: 0; border-top: 1px solid var(--line); } }
@media print { :root { color-scheme: light; --page: #fff; --card: #fff; --text: #000; --muted: #444;
  --line: #bbb; --grid: #ddd; --axis: #777;
    --warn: #8a4600; --warn-back: #fff; --good: #00664b; --good-back: #fff;
    --s0: #0072b2; --s1: #d55e00; --s2: #00805c; --s3: #a8518a; }
  body { font-size: 10.5pt; } main, footer { max-width: none; padding: 0; } header { padding-top: 0; }
  .figures { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  figure, .tile, tr { break-inside: avoid; } h2, h3 { break-after: avoid; } .text { max-height: none; } }
"""
