/** The charts: one for each kind of number, the runs over each other. */
import { type AxisKind, type Curve, curveOf, smooth } from './curves.js';
import { byteText, durationText, element, percent, shortNumber } from './dom.js';
import type { LogLine } from './types.js';

/** A run as the charts see it. */
export interface DrawnRun {
  readonly name: string;
  readonly colour: string;
  readonly lines: readonly LogLine[];
}

/** How the curves are drawn. */
export interface ChartOptions {
  readonly axis: AxisKind;
  /** Weight of the moving average over training curves, 0 to below 1. */
  readonly smoothing: number;
}

interface ChartKind {
  readonly title: string;
  /** Name in the log. */
  readonly train: string;
  readonly evaluated?: string;
  /** Not measured but known: there is nothing to smooth. */
  readonly exact?: true;
  /** The end of the axis, where the numbers have an end. */
  readonly most?: number;
  readonly text: (value: number) => string;
}

const kinds: readonly ChartKind[] = [
  { title: 'Loss', train: 'loss', evaluated: 'eval_loss', text: shortNumber },
  {
    title: 'Token accuracy',
    train: 'mean_token_accuracy',
    evaluated: 'eval_mean_token_accuracy',
    most: 1,
    text: percent,
  },
  { title: 'Learning rate', train: 'learning_rate', exact: true, text: shortNumber },
  { title: 'Gradient norm', train: 'grad_norm', text: shortNumber },
  { title: 'Tokens a second', train: 'tokens_per_second', text: shortNumber },
  { title: 'Peak memory', train: 'peak_memory_bytes', exact: true, text: byteText },
];

/** A curve of a chart. */
interface Drawn {
  readonly label: string;
  readonly colour: string;
  readonly kind: 'raw' | 'train' | 'eval';
  readonly curve: Curve;
}

function drawnCurves(kind: ChartKind, runs: readonly DrawnRun[], { axis, smoothing }: ChartOptions): Drawn[] {
  const weight = kind.exact === true ? 0 : smoothing;
  return runs.flatMap(({ name, colour, lines }): Drawn[] => {
    const raw = curveOf(lines, kind.train, axis);
    const label = runs.length > 1 ? `${name} ` : '';
    const evaluated = kind.evaluated === undefined ? undefined : curveOf(lines, kind.evaluated, axis);
    return [
      ...(weight > 0 ? [{ label: '', colour, kind: 'raw' as const, curve: raw }] : []),
      { label: `${label}train`, colour, kind: 'train', curve: { x: raw.x, y: smooth(raw.y, weight) } },
      ...(evaluated === undefined || evaluated.x.length === 0
        ? []
        : [{ label: `${label}eval`, colour, kind: 'eval' as const, curve: evaluated }]),
    ];
  });
}

/** The last number of a column up to a place. */
function valueAt(column: ArrayLike<number | null | undefined>, place: number): number | undefined {
  for (let i = Math.min(place, column.length - 1); i >= 0; i--) {
    const value = column[i];
    if (typeof value === 'number') return value;
  }
  return undefined;
}

const themeColour = (name: string): string => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

class Chart {
  readonly figure: HTMLElement;
  readonly #kind: ChartKind;
  readonly #place = element('div', { class: 'plot' });
  readonly #legend = element('ul', { class: 'legend' });
  #plot: uPlot | undefined;
  #drawn: readonly Drawn[] = [];
  #axis: AxisKind = 'step';
  /** What the plot was made for: another set of curves takes another plot. */
  #made = '';

  constructor(kind: ChartKind) {
    this.#kind = kind;
    this.figure = element(
      'figure',
      {},
      element('figcaption', {}, element('h3', {}, kind.title)),
      this.#place,
      this.#legend,
    );
    new ResizeObserver(() => this.#plot?.setSize(this.#size())).observe(this.#place);
  }

  draw(runs: readonly DrawnRun[], options: ChartOptions): void {
    this.#drawn = drawnCurves(this.#kind, runs, options);
    this.#axis = options.axis;
    const data = uPlot.join(this.#drawn.map(({ curve }) => [curve.x, curve.y]));
    const points = this.#drawn.map(({ curve }) => (curve.x.length < 2 ? 1 : 2));
    const made = JSON.stringify([
      this.#drawn.map(({ label, colour, kind }) => [label, colour, kind]),
      points,
      this.#axis,
    ]);
    this.#place.hidden = this.#drawn.every(({ curve }) => curve.x.length === 0);
    if (this.#plot !== undefined && made === this.#made) this.#plot.setData(data);
    else this.#make(data, made);
    this.#showValues();
  }

  /** Draws anew in the colours of the theme. */
  restyle(): void {
    if (this.#plot !== undefined) this.#make(this.#plot.data, this.#made);
  }

  #size(): { width: number; height: number } {
    return { width: Math.max(100, this.#place.clientWidth), height: Math.max(100, this.#place.clientHeight) };
  }

  #make(data: uPlot.AlignedData, made: string): void {
    this.#plot?.destroy();
    this.#made = made;
    const axis = { stroke: themeColour('--quiet'), grid: { stroke: themeColour('--grid') }, ticks: { show: false } };
    const { text, most = Infinity } = this.#kind;
    const range = (_: uPlot, low: number, high: number): uPlot.Range.MinMax => {
      const [from, to] = uPlot.rangeNum(low, high, 0.1, true);
      return [from, to === null ? to : Math.min(to, most)];
    };
    const along = (value: number): string => (this.#axis === 'time' ? durationText(value) : shortNumber(value));
    const plot = new uPlot(
      {
        ...this.#size(),
        legend: { show: false },
        scales: { x: { time: false }, y: { range } },
        axes: [
          { ...axis, size: 30, values: (_, splits) => splits.map(along) },
          { ...axis, size: 68, values: (_, splits) => splits.map(text) },
        ],
        cursor: { y: false, drag: { x: true, y: false } },
        series: [
          {},
          ...this.#drawn.map(({ colour, kind, curve }) => ({
            stroke: colour,
            width: kind === 'eval' ? 2 : 1.5,
            alpha: kind === 'raw' ? 0.3 : 1,
            spanGaps: true,
            // A single point is no line.
            points: { show: kind === 'eval' || (kind === 'train' && curve.x.length < 2), size: 5 },
            ...(kind === 'eval' ? { dash: [4, 4] } : {}),
          })),
        ],
        hooks: { setCursor: [() => this.#showValues()] },
      },
      data,
      this.#place,
    );
    plot.ctx.canvas.setAttribute('role', 'img');
    this.#plot = plot;
  }

  /** The values under the cursor, else the last ones. */
  #showValues(): void {
    const plot = this.#plot;
    if (plot === undefined) return;
    const place = plot.cursor.idx ?? Infinity;
    const items = this.#drawn.flatMap(({ label, colour, kind }, i) => {
      const value = valueAt(plot.data[i + 1], place);
      if (kind === 'raw' || value === undefined) return [];
      const swatch = element('span', { class: `swatch ${kind}` });
      swatch.style.setProperty('--run', colour);
      return [{ swatch, label, text: this.#kind.text(value) }];
    });
    this.#legend.replaceChildren(
      ...items.map(({ swatch, label, text }) => element('li', {}, swatch, `${label} `, element('b', {}, text))),
    );
    if (items.length === 0) this.#legend.replaceChildren(element('li', {}, 'no numbers yet'));
    const values = items.map(({ label, text }) => `${label} ${text}`).join(', ');
    plot.ctx.canvas.setAttribute('aria-label', `${this.#kind.title} by ${this.#axis}: ${values}`);
  }
}

/** Puts the charts into a place; what comes back draws them. */
export function makeCharts(place: HTMLElement): (runs: readonly DrawnRun[], options: ChartOptions) => void {
  const charts = kinds.map((kind) => new Chart(kind));
  place.replaceChildren(...charts.map(({ figure }) => figure));
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => {
    for (const chart of charts) chart.restyle();
  });
  return (runs, options) => {
    for (const chart of charts) chart.draw(runs, options);
  };
}
