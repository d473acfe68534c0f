/** `lorikeet plan`: what a run takes before it is begun, whether that fits, and what would make it fit. */
import { type Config, loadConfig } from '../config.js';
import type { CommandContext } from '../context.js';
import { withDataStore } from '../data-store.js';
import { errorMessage, ReportedError, UsageError } from '../errors.js';
import { type Machine, machineOf, tryPlan } from '../plan.js';
import { type Suggestion, suggestionsFor } from '../plan-fit.js';
import { fitText, type PlanJson, planJson, planTable, suggestionText } from '../plan-report.js';
import { plannedSteps, planSettings } from '../plan-settings.js';
import { loadRunData } from '../run-data.js';
import { deviceName, openCommandDevice, readModelFiles } from '../session.js';
import { formatBytes, printable } from '../text.js';

/** Options of the command. */
export interface PlanCommandOptions {
  readonly config?: string;
  /** Bytes that the run may take; the run file's `memory_limit_gb` when left out. */
  readonly budget?: number;
  /** False plans for rows of `max_length` tokens and reads no data. */
  readonly data: boolean;
  readonly dtype?: string;
  readonly loadIn4bit?: boolean;
}

/** What `plan --json` prints. */
export interface PlanReport {
  readonly model: string;
  readonly dtype: 'float32' | 'float16';
  readonly load_in_4bit: boolean;
  /** The device whose limits the plan keeps; null where there is none and WebGPU's guaranteed limits hold. */
  readonly device: string | null;
  /** Null where a buffer is larger than the device binds; `problem` says which. */
  readonly plan: PlanJson | null;
  readonly problem?: string;
  /** Null where it follows from data that was not read. */
  readonly total_steps: number | null;
  readonly budget_bytes: number | null;
  readonly fits: boolean;
  /** Changes with which it fits, where it does not. */
  readonly suggestions: readonly { readonly changes: Suggestion['changes']; readonly peak_bytes: number }[];
}

/** Runs the command. No weights are read, and the device is asked for its limits alone. */
export async function runPlan(
  context: CommandContext,
  overrides: readonly string[],
  options: PlanCommandOptions,
): Promise<void> {
  const { ui } = context;
  const { config, notes } = await loadConfig(options.config, {
    overrides,
    flags: { dtype: options.dtype, load_in_4bit: options.loadIn4bit },
  });
  for (const note of notes) ui.note(note);
  if (config.model_name_or_path === null) {
    throw new UsageError('the run names no model', { fix: 'Set model_name_or_path to a folder or a hub id.' });
  }
  const files = await readModelFiles(context, config.model_name_or_path, {
    revision: config.revision,
    cacheDir: config.cache_dir,
    weights: false,
  });
  const hasData = config.train_file !== null || config.dataset_name !== null || config.train_mixture !== null;
  const { tokenizer } = files;
  // What the plan takes of the data are its lengths.
  const { settings, steps } = await withDataStore({ streaming: config.streaming }, async (store) => {
    const data =
      options.data && hasData && tokenizer !== undefined
        ? await loadRunData(context, config, tokenizer, { store })
        : undefined;
    return { settings: await planSettings(config, files, data), steps: plannedSteps(config, data) };
  });
  const { machine, device } = await findMachine(context, config.device);
  const budget = options.budget ?? (config.memory_limit_gb === null ? undefined : config.memory_limit_gb * 1e9);

  const plan = await tryPlan(settings, machine);
  const problem = plan instanceof Error ? plan.message : undefined;
  const fits = !(plan instanceof Error) && plan.peakBytes <= (budget ?? Infinity);
  const suggestions = fits ? [] : await suggestionsFor(context, settings, { budget, machine });
  if (ui.json) {
    ui.data({
      model: files.name,
      dtype: settings.dtype === 'f32' ? 'float32' : 'float16',
      load_in_4bit: settings.load_in_4bit,
      device: device ?? null,
      plan: plan instanceof Error ? null : planJson(plan),
      ...(problem === undefined ? {} : { problem }),
      total_steps: steps ?? null,
      budget_bytes: budget ?? null,
      fits,
      suggestions: suggestions.map(({ changes, peakBytes }) => ({ changes, peak_bytes: peakBytes })),
    } satisfies PlanReport);
  } else {
    const { dim, bold, green, red } = ui.colors;
    const storage = `${settings.dtype === 'f32' ? 'float32' : 'float16'}${settings.load_in_4bit ? ', linear layers in 4 bits' : ''}`;
    const rows: [string, string][] = [
      ['model', `${printable(files.name)}, ${storage}`],
      ['device', device === undefined ? 'none here: WebGPU’s guaranteed limits' : printable(device)],
      ...(plan instanceof Error ? [] : planTable(plan, steps)),
    ];
    ui.table(rows.map(([name, value]) => [dim(name), value]));
    ui.line();
    if (plan instanceof Error) ui.line(`${red('does not fit')}: ${printable(plan.message, 400)}`);
    else if (budget === undefined)
      ui.line(`peak ${bold(formatBytes(plan.peakBytes))}; --budget 8GB says whether it fits`);
    else if (fits)
      ui.line(`${green('fits')} into ${formatBytes(budget)}, ${formatBytes(budget - plan.peakBytes)} are left`);
    else
      ui.line(`${red('does not fit')} into ${formatBytes(budget)}: ${formatBytes(plan.peakBytes - budget)} too much`);
    if (suggestions.length > 0) {
      ui.line('it fits with');
      for (const suggestion of suggestions) ui.line(`  ${suggestionText(suggestion)}`);
    }
  }
  if (fits) return;
  // The list above says what to do, where there is something.
  const fix = suggestions.length > 0 ? undefined : fitText(suggestions, budget);
  throw new ReportedError('the run does not fit', { fix });
}

/** The device that a run would take, as far as a plan depends on it. */
async function findMachine(
  context: CommandContext,
  wanted: Config['device'],
): Promise<{ readonly machine: Machine; readonly device: string | undefined }> {
  try {
    const device = await openCommandDevice({ device: wanted });
    const found = { machine: machineOf(device), device: deviceName(device) };
    device.destroy();
    return found;
  } catch (error) {
    context.ui.note(`planned for WebGPU's guaranteed limits: ${errorMessage(error)}`);
    return { machine: {}, device: undefined };
  }
}
