/** Settings with which a run would fit: each candidate is planned, none is guessed. */
import { quantizationProblem } from '@lorikeet/mistral';
import { isLoraConfig } from '@lorikeet/peft';
import type { CommandContext } from './context.js';
import { type Machine, plannedPeak, type PlanSettings } from './plan.js';

/** Settings that were changed, by their names in a run file. */
export type Changes = Readonly<Record<string, number | boolean>>;

/** A way to make a run fit. */
export interface Suggestion {
  readonly changes: Changes;
  readonly peakBytes: number;
  /** Rows of the data that are longer than the shorter `max_length`, where it was changed and the rows are known. */
  readonly longerRows?: number;
}

/** One setting and what it could be instead, the mildest first. */
interface Dial {
  readonly choices: readonly { readonly changes: Changes; readonly settings: Partial<PlanSettings> }[];
}

/** Ways that are shown at most. */
const mostShown = 3;

/** The dials in the order in which they are tried: what costs time before what changes the result. */
function dialsOf(settings: PlanSettings): Dial[] {
  const { per_device_train_batch_size: batch, gradient_accumulation_steps: accumulation } = settings;
  const { max_length, adapter } = settings;
  const lora = isLoraConfig(adapter) ? adapter : undefined;
  // LoftQ stores 4 bits already, from the weights as they are; and what is trained whole cannot be stored in 4 bits.
  const canPack =
    quantizationProblem(settings.model) === undefined &&
    lora?.init_lora_weights !== 'loftq' &&
    !(adapter.modules_to_save ?? []).some((name) => name.endsWith('_proj'));
  const halvings = (value: number): number[] =>
    Array.from({ length: Math.floor(Math.log2(Math.max(1, value))) }, (_, i) => Math.floor(value / 2 ** (i + 1)));
  const divisors = Array.from({ length: batch - 1 }, (_, i) => batch - 1 - i).filter((rows) => batch % rows === 0);
  // Batches are as wide as multiples of 64, so that nothing between two of them saves anything.
  const shorter = halvings(Math.ceil(max_length / 64)).map((n) => 64 * n);
  const flag = (name: 'gradient_checkpointing' | 'load_in_4bit', can = true): Dial => ({
    choices: settings[name] || !can ? [] : [{ changes: { [name]: true }, settings: { [name]: true } }],
  });
  return [
    flag('gradient_checkpointing'),
    flag('load_in_4bit', canPack),
    {
      choices: divisors.map((rows) => {
        const changes = {
          per_device_train_batch_size: rows,
          gradient_accumulation_steps: (accumulation * batch) / rows,
        };
        // An evaluation has no accumulation: its batch shrinks with the other.
        const evalRows = Math.min(settings.per_device_eval_batch_size, rows);
        return evalRows === settings.per_device_eval_batch_size
          ? { changes, settings: changes }
          : {
              changes: { ...changes, per_device_eval_batch_size: evalRows },
              settings: { ...changes, per_device_eval_batch_size: evalRows },
            };
      }),
    },
    {
      choices: halvings(settings.per_device_eval_batch_size).map((rows) => ({
        changes: { per_device_eval_batch_size: rows },
        settings: { per_device_eval_batch_size: rows },
      })),
    },
    { choices: shorter.map((length) => ({ changes: { max_length: length }, settings: { max_length: length } })) },
    {
      choices: halvings(lora?.r ?? 1)
        .filter((value) => lora?.init_lora_weights !== 'orthogonal' || value % 2 === 0)
        .map((r) => ({ changes: { 'lora.r': r }, settings: { adapter: Object.assign({ ...adapter }, { r }) } })),
    },
  ].filter(({ choices }) => choices.length > 0);
}

/** All subsets of `size` items, in order. */
function* subsets<T>(items: readonly T[], size: number): Generator<T[]> {
  if (size === 0) yield [];
  else
    for (const [i, item] of items.entries())
      for (const rest of subsets(items.slice(i + 1), size - 1)) yield [item, ...rest];
}

/**
 * The smallest changes with which a run fits into `budget` bytes: as few settings as possible, each changed no more than
 * it must be. Up to three ways; none when even all changes together do not suffice.
 */
export async function settingsThatFit(
  settings: PlanSettings,
  budget: number,
  options: {
    readonly machine?: Machine | undefined;
    readonly peak?: typeof plannedPeak;
    readonly signal?: AbortSignal;
    /** Called after each plan. */
    readonly onPlan?: (plans: number) => void;
  } = {},
): Promise<Suggestion[]> {
  const { machine, peak = plannedPeak, signal, onPlan } = options;
  const known = new Map<string, number>();
  // A run whose buffers are larger than the device binds fits into no budget.
  const fits = (bytes: number): boolean => bytes <= budget && Number.isFinite(bytes);
  const dials = dialsOf(settings);

  /** The peak with choice `at[i]` of dial i. */
  const peakAt = async (chosen: readonly Dial[], at: readonly number[]): Promise<number> => {
    signal?.throwIfAborted();
    const changed = chosen.reduce<PlanSettings>(
      (all, dial, i) => ({ ...all, ...dial.choices[at[i]].settings }),
      settings,
    );
    const key = chosen.map((dial, i) => JSON.stringify(dial.choices[at[i]].changes)).join();
    const bytes = known.get(key) ?? (await peak(changed, machine));
    known.set(key, bytes);
    onPlan?.(known.size);
    return bytes;
  };

  const strongest = (chosen: readonly Dial[]): number[] => chosen.map(({ choices }) => choices.length - 1);
  if (dials.length === 0 || !fits(await peakAt(dials, strongest(dials)))) return [];
  const found: Suggestion[] = [];
  for (let size = 1; size <= dials.length && found.length === 0; size++) {
    for (const chosen of subsets(dials, size)) {
      const at = strongest(chosen);
      if (!fits(await peakAt(chosen, at))) continue;
      // What changes the result most comes last, and is made milder first.
      for (let i = at.length - 1; i >= 0; i--) {
        for (let milder = 0; milder < at[i]; milder++) {
          const trial = at.with(i, milder);
          if (!fits(await peakAt(chosen, trial))) continue;
          at[i] = milder;
          break;
        }
      }
      const changes = chosen.reduce<Changes>((all, dial, i) => ({ ...all, ...dial.choices[at[i]].changes }), {});
      found.push({ changes, peakBytes: await peakAt(chosen, at), ...longerRows(settings, changes) });
      if (found.length >= mostShown) break;
    }
  }
  return found;
}

/** `settingsThatFit` with progress, and until Ctrl-C. */
export async function suggestionsFor(
  { ui, signal }: CommandContext,
  settings: PlanSettings,
  { budget = Infinity, machine }: { readonly budget?: number | undefined; readonly machine?: Machine | undefined },
): Promise<Suggestion[]> {
  const progress = ui.progress('looking for settings that fit');
  try {
    return await settingsThatFit(settings, budget, { machine, signal, onPlan: (plans) => progress.update(plans) });
  } finally {
    progress.done();
  }
}

function longerRows({ rows }: PlanSettings, { max_length }: Changes): Pick<Suggestion, 'longerRows'> {
  if (rows === undefined || typeof max_length !== 'number') return {};
  return { longerRows: Array.from(rows.packed ?? rows.train.lengths).filter((length) => length > max_length).length };
}
