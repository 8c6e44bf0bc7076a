#!/usr/bin/env python3
"""Draw the course's pictures: nbs/images/*.svg, one a concept, in colours that the colour-blind can tell apart.

usage: draw.py [FOLDER]
matplotlib's pictures have one set of colours; these follow the reader's light or dark screen, and stay sharp.
"""
import json
import sys
from html import escape
from pathlib import Path

root = Path(__file__).resolve().parent.parent
STYLE = '''<style>
text { font: 13px system-ui, sans-serif; fill: #1a1a1a } .small { font-size: 11px } .mono { font-family: monospace }
.bold { font-weight: 600 } .line { stroke: #1a1a1a; fill: none } .box { stroke: #666 } .frozen { fill: #d9d9d9 }
.trains { fill: #f0c36d } .kept { fill: #9fd3f2 } .end { fill: #e7a6c8 } .paper { fill: #ffffff } .none { fill: none }
.off { fill: #00000010 }
@media (prefers-color-scheme: dark) {
text { fill: #e6e6e6 } .line { stroke: #e6e6e6 } .box { stroke: #999 } .frozen { fill: #4a4a4a }
.trains { fill: #7d5400 } .kept { fill: #0b4a6e } .end { fill: #7a2f57 } .paper { fill: #1e1e1e }
.off { fill: #ffffff14 }
}
</style>'''
ARROW = ('<marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
         '<path class="line" d="M0 0 L8 4 L0 8"/></marker>')


def svg(width, height, parts, about):
    "A whole picture; `about` is what a screen reader says."
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img" aria-label="{escape(about)}">')
    paper = f'<rect class="paper" width="{width}" height="{height}"/>'
    return '\n'.join([head, STYLE, f'<defs>{ARROW}</defs>', paper, *parts, '</svg>']) + '\n'


def box(x, y, width, height, kind, label='', style='small'):
    "A rectangle with a label in its middle."
    out = f'<rect class="box {kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="2"/>'
    if label:
        out += words(x + width/2, y + height/2 + 4, label, style, 'middle')
    return out


def words(x, y, text, style='', anchor='start'):
    "A line of text."
    return f'<text x="{x}" y="{y}" class="{style}" text-anchor="{anchor}" xml:space="preserve">{escape(text)}</text>'


def arrow(x1, y1, x2, y2):
    "A straight arrow."
    return f'<path class="line" d="M{x1} {y1} L{x2} {y2}" marker-end="url(#a)"/>'


def wrapped(text, width):
    "A text in lines of at most so many characters."
    lines, line = [], ''
    for word in text.replace('\n', ' / ').split():
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = ''
        line = f'{line} {word}'.strip()
    return [*lines, line]


# ---- the front page: answers before and after ----

def answers():
    "Prompts of rows that were held back, and what the model said before and after `make train`."
    found = json.loads((root/'benchmarks'/'results'/'2026-11-28-make-train.json').read_text(encoding='utf-8'))
    parts, y = [words(16, 24, 'asked', 'bold'), words(230, 24, 'before', 'bold'), words(560, 24, 'after', 'bold')], 46
    for sample in found['answers'][:4]:
        columns = [(16, wrapped(sample['asked'], 30)), (560, wrapped(sample['after'], 44)),
                   (230, wrapped(sample['before'], 44))]
        tall = max(len(lines) for _, lines in columns)
        parts.append(f'<path class="line" d="M16 {y - 14} H884" opacity=".3"/>')
        for x, lines in columns:
            parts += [words(x, y + 16*i, line, 'small') for i, line in enumerate(lines)]
        y += 16*tall + 14
    return svg(900, y, parts, 'Four answers before and after training: long and often cut, then short and ended')


# ---- chapter 02: which tokens count ----

# the demo model's tokens of the end of "Which planet is closest to the sun?"; 0 prompt, 1 response, 2 end
MASKED = [('###', 0), (' Response', 0), (':', 0), ('\\n', 0), ('M', 1), ('ercury', 1), (',', 1), (' which', 1),
          (' is', 1), (' also', 1), (' the', 1), (' smallest', 1), (' planet', 1), ('.', 1), ('<|im_end|>', 2)]


def masked():
    "The end of one example: prompt, response, and the end token, with the two losses below."
    parts = [words(16, 24, '... ### Instruction:\\nWhich planet is closest to the sun?\\n\\n', 'small mono')]
    x, kinds = 100, ('frozen', 'trains', 'end')
    for text, kind in MASKED:
        width = 7*len(text) + 14
        parts.append(box(x, 40, width, 28, kinds[kind], text, 'small mono'))
        for y, first in ((82, 0), (106, 1)):
            learnt = kind >= first
            parts.append(box(x, y, width, 18, 'kept' if learnt else 'off', '+' if learnt else '-'))
        if text in ('###', 'M', '<|im_end|>'):
            parts.append(words(x, 148, {'###': 'prompt', 'M': 'response'}.get(text, 'one end token'), 'small'))
        x += width + 4
    parts += [words(16, 95, 'loss on all', 'small'), words(16, 119, 'on responses', 'small'),
              words(16, 168, '+ is learnt, - is only read', 'small')]
    return svg(x + 16, 182, parts, 'The tokens of one example; with the loss on responses only those of the answer and '
                                   'its end token are learnt, the prompt is masked')


# ---- chapter 03: documents that share a row ----

def packed():
    "A row of three documents: tokens, positions, and who reads whom."
    lengths, cell, x0, y0 = (4, 3, 2), 30, 150, 80
    kinds = ('trains', 'kept', 'end')
    owner = [d for d, n in enumerate(lengths) for _ in range(n)]
    position = [i for n in lengths for i in range(n)]
    parts = [words(16, 30, 'documents', 'small'), words(16, 60, 'positions', 'small'),
             words(16, y0 + 20, 'who reads', 'small'), words(16, y0 + 36, '(down) whom', 'small')]
    for i, d in enumerate(owner):
        parts.append(box(x0 + i*cell, 12, cell - 2, 24, kinds[d], 'ABC'[d]))
        parts.append(words(x0 + i*cell + 14, 60, str(position[i]), 'small mono', 'middle'))
        for j, e in enumerate(owner):
            sees = d == e and j <= i
            parts.append(box(x0 + j*cell, y0 + i*cell, cell - 2, cell - 2, kinds[d] if sees else 'off'))
    parts += [words(450, y0 + 60, 'A token reads its own document, up to itself:', 'small'),
              words(450, y0 + 78, 'three triangles and nothing between them.', 'small'),
              words(450, y0 + 106, 'Without restarting positions the whole lower', 'small'),
              words(450, y0 + 124, 'triangle would be filled: B would read A.', 'small')]
    return svg(760, y0 + 9*cell + 16, parts, 'Three documents in a row of nine tokens: positions restart in each, and '
                                             'attention stays in three triangles, one a document')


# ---- chapter 04: trunk and tail ----

def trunk_and_tail():
    "What is frozen, what trains, what can be kept, and how far the gradient goes."
    parts = [box(16, 60, 90, 44, 'frozen', 'embedding'), box(126, 60, 210, 44, 'frozen', 'layers 0-23'),
             box(366, 60, 90, 44, 'kept', 'states'), box(486, 60, 130, 44, 'trains', 'layers 24-29'),
             box(636, 60, 70, 44, 'trains', 'head'), words(736, 87, 'loss', 'bold')]
    for x1, x2 in ((106, 126), (336, 366), (456, 486), (616, 636), (706, 732)):
        parts.append(arrow(x1, 82, x2, 82))
    parts += [words(170, 40, 'trunk: frozen, one pass, no gradient', 'small'),
              words(500, 40, 'tail: trains, in fp32', 'small'), arrow(732, 126, 490, 126),
              words(520, 146, 'the gradient ends here', 'small'),
              words(330, 146, 'the same in every epoch:', 'small', 'middle'),
              words(330, 162, 'computed once, then kept (chapter 09)', 'small', 'middle')]
    return svg(790, 178, parts, 'The trunk, embedding and layers 0 to 23, is frozen; its output can be kept; the tail, '
                                'layers 24 to 29 and the head, trains, and the gradient goes no further')


# ---- chapter 10: what each choice computes and keeps ----

N_LAYERS = 30
WAYS = (('last 6 and head', range(24, 30), 24, 'layer', True, '6 + 12 = 18'),
        ('LoRA on the last 6', range(24, 30), 24, 'lora', False, '6 + 6 = 12'),
        ('LoRA on the last 15', range(15, 30), 15, 'lora', False, '15 + 15 = 30'),
        ('middle 6', range(12, 18), 12, 'layer', False, '18 + 24 = 42'),
        ('LISA, 2 of 30 and head', (9, 20), 0, 'layer', True, '30 + 23 = 53 (mean)'),
        ('LoRA on all layers', range(30), 0, 'lora', False, '30 + 30 = 60'),
        ('Spectrum, a quarter', range(30), 0, 'part', False, '30 + 37 = 67'),
        ('full', range(30), 0, 'layer', True, '30 + 60 = 90'))  # name, layers, kept below, what, head, passes a step


def way(y, name, layers, first, what, head, passes):
    "One choice: the model from the embedding to the head, and how many passes of a layer a step takes."
    below = 'kept' if first else 'frozen'
    whole = what == 'layer' and first == 0 and len(layers) == N_LAYERS
    parts = [words(16, y + 18, name, 'small'), box(180, y, 44, 26, 'trains' if whole else below)]
    for i in range(N_LAYERS):
        x, kind = 230 + 11*i, 'kept' if i < first else 'frozen'
        parts.append(box(x, y, 10, 26, 'trains' if i in layers and what == 'layer' else kind))
        if i in layers and what != 'layer':
            parts.append(box(x, y, 10, 5 if what == 'lora' else 8, 'trains'))
    parts += [box(566, y, 44, 26, 'trains' if head else 'frozen'), words(628, y + 18, passes, 'small')]
    return parts


def choices():
    "What each choice of chapter 10 trains, keeps and computes."
    parts = [words(202, 30, 'embedding', 'small', 'middle'), words(394, 30, 'layers 0 to 29', 'small', 'middle'),
             words(588, 30, 'head', 'small', 'middle'), words(628, 14, 'a step, in passes of one', 'small'),
             words(628, 30, 'layer: forward + backward', 'small')]
    for i, one in enumerate(WAYS):
        parts += way(42 + 36*i, *one)
    y = 42 + 36*len(WAYS) + 8
    for x, kind, text in ((180, 'kept', 'output kept, not computed again'), (400, 'frozen', 'frozen, computed'),
                          (540, 'trains', 'trains (a strip: small matrices, or some of them)')):
        parts += [box(x, y, 14, 14, kind), words(x + 20, y + 11, text, 'small')]
    return svg(850, y + 30, parts, 'Which layers each choice trains, which are frozen, of which the output is kept, '
                                   'and how many passes of one layer a step takes')


# ---- chapter 12: what a checkpoint holds ----

HOLDS = (('weights.safetensors', 'what trains, by name', 'trains'),
         ('optimizer.safetensors', "AdamW's two averages of each weight", 'trains'),
         ('random.safetensors', "torch's random generators", 'kept'),
         ('state.json', 'step, schedule, sizes of the logs, the best so far', 'kept'),
         ('manifest.json', 'size and checksum of the files above', 'end'))
NOT_IN_IT = ('frozen weights: they are in the model that the run began with',
             'rows and their order: made again from the data and the seed',
             'metrics and samples: in the logs, cut back to the step')


def checkpoint():
    "The files of step-N, and what is made again instead."
    parts = [words(16, 26, 'checkpoints/step-N', 'bold mono'), words(560, 26, 'not in it', 'bold')]
    for i, (name, what, kind) in enumerate(HOLDS):
        y = 40 + 36*i
        parts += [box(16, y, 190, 28, kind, name, 'small mono'), words(218, y + 19, what, 'small')]
    for i, what in enumerate(NOT_IN_IT):
        parts += [words(560, 62 + 46*i + 16*j, line, 'small') for j, line in enumerate(wrapped(what, 44))]
    return svg(860, 232, parts, 'A checkpoint holds trained weights, optimizer state, random states, the state of the '
                                'run and a manifest; frozen weights and rows are not in it')


# ---- chapter 14: who holds what ----

HELD = (('frozen layers', 'frozen'), ('layers that train', 'trains'), ('their gradients', 'end'), ('optimizer', 'end'))


def process(x, y, number, piece):
    "One process: its rows of a step, and what it holds, all of it or a piece."
    parts = [words(x + 85, y, f'process {number}', 'bold', 'middle'),
             words(x + 85, y + 18, f'rows {number} and {number + 2} of the step', 'small', 'middle')]
    for i, (what, kind) in enumerate(HELD):
        top = y + 28 + 34*i
        if piece:
            left = x + 85*number
            parts += [box(x, top, 170, 28, 'off'), box(left, top, 85, 28, kind)]
            parts.append(words(x + 85, top + 18, what, 'small', 'middle'))
        else:
            parts.append(box(x, top, 170, 28, kind, what))
    return parts


def both_ways(x, y):
    "A short arrow to both sides."
    return f'<path class="line" d="M{x} {y} h34" marker-end="url(#a)"/><path class="line" d="M{x + 34} {y} h-34" ' \
           'marker-end="url(#a)"/>'


def who_holds_what():
    "Two processes under DDP and under FSDP2: what each has, what goes between them, what is there once."
    parts = []
    for x, way, piece in ((16, 'DDP: all of it in each', False), (456, 'FSDP2: a piece of it in each', True)):
        parts += [words(x, 24, way, 'bold'), *process(x, 54, 0, piece), *process(x + 214, 54, 1, piece)]
        parts += [both_ways(x + 175, y) for y in ((96, 130, 164) if piece else (164,))]
        parts.append(box(x, 250, 384, 28, 'kept', 'kept states of the frozen layers: one file, read by both'))
        parts.append(box(x, 284, 384, 28, 'paper', 'run folder, log, checkpoints, report: by process 0'))
    parts += [words(16, 236, 'sent: the gradients, once a step', 'small'),
              words(456, 236, 'sent: each layer when its turn comes, then the gradients', 'small')]
    return svg(856, 328, parts, 'Under DDP each of two processes holds all frozen and trained layers, gradients and '
                                'optimizer state, and gradients are sent; under FSDP2 each holds one half of them, and '
                                'layers are sent too; kept states and run folder exist once')


# ---- chapter 14: a stream ----

CURVES = '''<style>
.blue { stroke: #0072b2; fill: none } .orange { stroke: #d55e00; fill: none }
@media (prefers-color-scheme: dark) { .blue { stroke: #56b4e9 } .orange { stroke: #e69f00 } }
</style>'''
STREAM_SPEED = 4000  # rows a second at the top of the scale


def curve(points, x, y, kind, style=''):
    "A line through points; x and y say where a value stands."
    path = ' '.join(f'{"L" if i else "M"}{x(a):.1f} {y(b):.1f}' for i, (a, b) in enumerate(points))
    return f'<path class="{kind}" d="{path}" {style}/>'


def panel(top, height, most, unit, x):
    "An empty panel with a scale from 0 to `most`; a function that says where a value stands comes with it."
    def y(value):
        return top + height - height*value/most

    parts = [words(16, top - 10, unit, 'small')]
    for value in (0, most/2, most):
        parts += [f'<path class="line" d="M{x(0):.1f} {y(value):.1f} H{x(5):.1f}" opacity=".25"/>',
                  words(x(0) - 8, y(value) + 4, f'{value:g}', 'small', 'end')]
    return parts, y


def stream():
    "Memory and speed while a file is read, by how much of it was read; `benchmarks/stream.py` has measured them."
    found = json.loads((root/'benchmarks'/'results'/'2026-11-27-stream.json').read_text(encoding='utf-8'))['runs']

    def x(gb):
        return 70 + 132*gb

    above, memory = panel(50, 100, 2, 'GiB resident (the process that has most)', x)
    below, speed = panel(200, 100, STREAM_SPEED, 'rows a second', x)
    parts = [CURVES, *above, *below, words(x(5), 330, 'GB of the file that were read', 'small', 'end')]
    for run, kind, place in zip(found, ('blue', 'orange'), (x(1.8), x(3.2))):
        gb, points = run['bytes']/1e9, [p for p in run['points'] if p[1] > 0 and len(p) > 2]
        some = points[:1]
        for p in points:
            if p[0] >= some[-1][0] + 60:  # speed is that of a minute or more
                some.append(p)
        rates = [(b[1]*gb, (b[1] - a[1])*run['rows']/(b[0] - a[0])) for a, b in zip(some, some[1:]) if b[1] > a[1]]
        parts += [curve([(p[1]*gb, max(p[2:])/1024) for p in points], x, memory, kind), curve(rates, x, speed, kind),
                  words(place, 24, f"{run['processes']} process{'es' if run['processes'] > 1 else ''}", 'small'),
                  f'<path class="{kind}" d="M{place - 26:.1f} 20 H{place - 6:.1f}"/>']
        if kill := run.get('kill'):
            at = next(p[1] for p in points if p[0] >= kill['seconds'] - 4)*gb
            parts += [f'<path class="{kind}" stroke-dasharray="3 3" d="M{x(at):.1f} 46 V300"/>',
                      words(x(at) + 4, 300 - 6*run['processes'], 'killed, resumed', 'small')]
    for gb in range(6):
        parts.append(words(x(gb), 316, str(gb), 'small', 'middle'))
    return svg(760, 342, parts, 'Memory and speed while a large file is read, by one process and by two')


PICTURES = {'answers': answers, 'masked': masked, 'packed': packed, 'trunk-and-tail': trunk_and_tail,
            'choices': choices, 'checkpoint': checkpoint, 'who-holds-what': who_holds_what, 'stream': stream}


if __name__ == '__main__':
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else root/'nbs'/'images'
    for name, draw in PICTURES.items():
        (folder/f'{name}.svg').write_text(draw(), encoding='utf-8')
