"""The report's style sheet: no font, script or picture from elsewhere."""

STYLE = """
:root{--ink:#1f2933;--soft:#616e7c;--line:#e4e7eb;--bg:#f5f7fa;--good:#0b6e4f;--bad:#b3261e;--warn:#8a5a00}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
  font:15px/1.5 system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1180px;margin:0 auto;padding:28px 24px 60px}
h1{font-size:26px;margin:0 0 10px;letter-spacing:-.01em}
h2{font-size:19px;margin:0 0 12px}h2 small,h4 small{font-weight:400;color:var(--soft);font-size:.8em}
h3{font-size:15px;margin:24px 0 4px}h4{font-size:14px;margin:0 0 6px}
dl{display:flex;flex-wrap:wrap;gap:6px 28px;margin:0 0 18px}
dt{color:var(--soft);font-size:12px}dd{margin:0;font-weight:500}
section{background:#fff;border:1px solid var(--line);border-radius:8px;padding:18px 20px;margin:0 0 18px;
  overflow-x:auto}
.verdict{border-left:6px solid var(--soft);font-size:16px}.verdict strong{font-size:19px;margin-right:14px}
.verdict.good{border-left-color:var(--good)}.verdict.good strong{color:var(--good)}
.verdict.bad{border-left-color:var(--bad)}.verdict.bad strong{color:var(--bad)}
.verdict table{margin-top:10px;width:auto}
table{border-collapse:collapse;width:100%;font-size:13px}
th{font-weight:600;text-align:left;color:var(--soft);font-size:12px;vertical-align:bottom}
td,th{padding:4px 12px 4px 0;border-bottom:1px solid var(--line);vertical-align:top}
tbody tr:last-child td{border-bottom:0}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}.u{color:var(--soft)}
b.bad,.failed{color:var(--bad)}b.good,.replayed{color:var(--good)}.inputs{color:var(--warn)}
b.replayed,b.inputs,b.failed{font-weight:500}
th i{display:inline-block;width:9px;height:9px;border-radius:2px;margin-right:6px}
code,pre{font:12.5px ui-monospace,"SF Mono",Menlo,"DejaVu Sans Mono",monospace}
pre{background:var(--bg);padding:10px 14px;border-radius:6px;overflow-x:auto}
svg{max-width:100%;height:auto;display:block;margin:6px 0}
.how{color:var(--soft);margin:0 0 6px;font-size:13px}
.lines{border-radius:6px;padding:8px 14px;margin:0 0 10px;background:#fff8e6;font-size:13.5px}
.lines.bad{background:#fdecea}.lines ul{margin:2px 0 0;padding-left:20px}
.lines.bad b{color:var(--bad)}.lines.warn b{color:var(--warn)}
.moments{display:grid;gap:14px}.moment{border-top:1px solid var(--line);padding-top:10px}
.pair{display:flex;gap:14px;align-items:center;flex-wrap:wrap}
.pics{display:flex;gap:8px}.plot{flex:1;min-width:420px}
figure{margin:0}figure img{width:170px;border-radius:4px;display:block}
figcaption{font-size:11px;color:var(--soft)}
footer{color:var(--soft);font-size:13px}summary{cursor:pointer}a{color:#0072b2}
@media print{body{background:#fff}section{border:0;padding:0}}
"""
