/** Plans in words: where the memory goes, whether it is enough, and what would make it so. */
import type { MemoryPart, Stats } from '@lorikeet/tensor';
import type { Plan } from './plan.js';
import type { Changes, Suggestion } from './plan-fit.js';
import { formatBytes, formatCount } from './text.js';
import { formatTable } from './ui.js';

const partNames: Readonly<Record<MemoryPart, string>> = {
  weights: 'weights',
  adapters: 'adapters',
  optimizer: 'optimizer',
  activations: 'saved activations',
  cache: 'cache',
  workspace: 'workspace',
};

/** What the memory is for: parts that take some in any of the accounts, with the bytes of each. */
export function partRows(...accounts: readonly Stats['peakParts'][]): [name: string, ...bytes: number[]][] {
  const parts = Object.keys(partNames).filter((part): part is MemoryPart => part in partNames);
  return parts
    .map((part): [string, ...number[]] => [partNames[part], ...accounts.map((account) => account[part])])
    .filter(([, ...bytes]) => bytes.some((n) => n > 0));
}

/** `weights 14.5 GB, adapters 168 MB`. */
export function partsInWords(parts: Stats['peakParts']): string {
  return partRows(parts)
    .map(([name, bytes]) => `${name} ${formatBytes(bytes)}`)
    .join(', ');
}

/** `gradient_checkpointing=true lora.r=8`: as the command line takes it. */
export function changesText(changes: Changes): string {
  return Object.entries(changes)
    .map(([key, value]) => `${key}=${value}`)
    .join(' ');
}

/** One way to make a run fit, with its peak and its price. */
export function suggestionText({ changes, peakBytes, longerRows = 0 }: Suggestion): string {
  const price = longerRows === 0 ? '' : `; ${formatCount(longerRows)} rows are longer, see overlong`;
  return `${changesText(changes)} (${formatBytes(peakBytes)}${price})`;
}

/** What can be done about a run that does not fit, as one sentence. `bytes`: what there is, where that is limited. */
export function fitText(suggestions: readonly Suggestion[], bytes: number = Infinity): string {
  if (suggestions.length > 0) return `It fits with ${suggestions.map(suggestionText).join(', or with ')}.`;
  const enough = Number.isFinite(bytes) ? `bring it below ${formatBytes(bytes)}` : 'make its buffers small enough';
  return `Checkpointing, 4 bits, one row at a time, the shortest max_length and the smallest adapter together do not ${enough}: take a smaller model or more memory.`;
}

/** Operations with a unit of powers of 1000: `89.1 TFLOP`. */
export function formatFlops(flops: number): string {
  const power = Math.min(6, Math.max(0, Math.floor(Math.log10(Math.max(1, flops)) / 3)));
  return `${(flops / 1000 ** power).toPrecision(3)} ${['', 'k', 'M', 'G', 'T', 'P', 'E'][power]}FLOP`;
}

/** A plan as a table of two columns, the memory first. */
export function planTable(plan: Plan, steps: number | undefined): [name: string, value: string][] {
  const { batch, step } = plan;
  const share = `${((100 * batch.supervised) / (batch.B * batch.T)).toFixed(0)} %`;
  return [
    ...partRows(plan.parts).map(([name, bytes]): [string, string] => [name, formatBytes(bytes)]),
    [`peak, in ${plan.peakIn}`, formatBytes(plan.peakBytes)],
    ['with freed buffers', `${formatBytes(plan.reservedBytes)} if nothing limits it`],
    ['parameters', formatCount(plan.parameters)],
    ['trainable', `${formatCount(plan.trainable)}, ${plan.percent.toPrecision(3)} % of all`],
    ['largest batch', `${batch.B} x ${batch.T} tokens, ${share} of them trained`],
    ['a step', `${formatFlops(step.flops)} in ${formatCount(step.dispatches)} dispatches`],
    ['', `at most ${formatBytes(step.boundBytes)} moved, ${formatBytes(step.uploadedBytes)} uploaded`],
    ['steps', steps === undefined ? 'as many as the data says' : formatCount(steps)],
    ...(steps === undefined ? [] : [['the run', formatFlops(steps * step.flops)] satisfies [string, string]]),
  ];
}

/** A plan and what was counted, side by side by part. */
export function planBesideCount(plan: Plan, counted: Stats): string {
  return formatTable(
    [
      ['', 'planned', 'counted'],
      ...partRows(plan.parts, counted.peakParts).map(([name, ...bytes]) => [name, ...bytes.map(formatBytes)]),
      ['peak', formatBytes(plan.peakBytes), formatBytes(counted.peakBytes)],
    ],
    ['left', 'right', 'right'],
  );
}

/** A plan as machines read it. */
export interface PlanJson {
  readonly peak_bytes: number;
  readonly parts: Plan['parts'];
  readonly peak_in: Plan['peakIn'];
  readonly reserved_bytes: number;
  readonly parameters: number;
  readonly trainable: number;
  readonly trainable_percent: number;
  readonly batch: { readonly rows: number; readonly tokens: number; readonly trained_tokens: number };
  readonly step: {
    readonly dispatches: number;
    readonly flops: number;
    readonly bound_bytes: number;
    readonly uploaded_bytes: number;
    readonly tokens: number;
  };
}

/** A plan as machines read it. */
export function planJson({ batch, step, ...plan }: Plan): PlanJson {
  return {
    peak_bytes: plan.peakBytes,
    parts: plan.parts,
    peak_in: plan.peakIn,
    reserved_bytes: plan.reservedBytes,
    parameters: plan.parameters,
    trainable: plan.trainable,
    trainable_percent: plan.percent,
    batch: { rows: batch.B, tokens: batch.T, trained_tokens: batch.supervised },
    step: {
      dispatches: step.dispatches,
      flops: step.flops,
      bound_bytes: step.boundBytes,
      uploaded_bytes: step.uploadedBytes,
      tokens: step.tokens,
    },
  };
}
