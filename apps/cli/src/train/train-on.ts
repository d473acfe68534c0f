/** Runs on devices: planned beside the memory there is, and on a new device when one is lost. */
import { dirname } from 'node:path';
import { setTimeout as pause } from 'node:timers/promises';
import { type Device, DeviceLostError, OutOfMemoryError } from '@lorikeet/tensor';
import { type CheckpointFolder, findCheckpoint } from '../checkpoint.js';
import type { CommandContext } from '../context.js';
import { CliError, errorMessage, lostDeviceFix } from '../errors.js';
import { machineOf, tryPlan } from '../plan.js';
import { suggestionsFor } from '../plan-fit.js';
import { fitText, partsInWords, planBesideCount } from '../plan-report.js';
import { planSettings } from '../plan-settings.js';
import { deviceName } from '../session.js';
import { formatBytes, printable, shellQuoted } from '../text.js';
import { type PreparedRun, RunFrame } from './frame.js';
import { Run } from './run.js';

/**
 * Plans a run and does it, on a device of the caller's.
 * @throws CliError when the plan is over the run's `memory_limit_gb`, or the memory does not suffice after all; it says by
 * part what was planned, in the latter case what was counted, and which settings would fit
 */
export async function trainOn(context: CommandContext, device: Device, run: PreparedRun): Promise<void> {
  const { config, files, data } = run;
  const settings = await planSettings(config, files, data);
  const machine = machineOf(device);
  const plan = await tryPlan(settings, machine);
  const limit = config.memory_limit_gb === null ? Infinity : config.memory_limit_gb * 1e9;
  if (plan instanceof OutOfMemoryError) {
    const suggestions = await suggestionsFor(context, settings, { budget: limit, machine });
    throw new CliError(plan.message, { fix: fitText(suggestions, limit), cause: plan });
  }
  if (plan.peakBytes > limit) {
    throw new CliError(
      `the run would take ${formatBytes(plan.peakBytes)} (${partsInWords(plan.parts)}), more than memory_limit_gb: ${config.memory_limit_gb}`,
      { fix: fitText(await suggestionsFor(context, settings, { budget: limit, machine }), limit) },
    );
  }
  try {
    await new Run(new RunFrame(context, run, { device, plan })).go();
  } catch (error) {
    if (!(error instanceof OutOfMemoryError)) throw error;
    const counted = device.stats();
    // So much was there, which is all that is known when the device itself has no more.
    const budget = counted.peakReservedBytes;
    const suggestions = await suggestionsFor(context, settings, { budget, machine });
    if (context.ui.json) {
      context.ui.data({
        event: 'out_of_memory',
        planned: { peak_bytes: plan.peakBytes, parts: plan.parts },
        counted: { peak_bytes: counted.peakBytes, parts: counted.peakParts },
        suggestions: suggestions.map(({ changes, peakBytes }) => ({ changes, peak_bytes: peakBytes })),
      });
    }
    throw new CliError(`out of memory: ${error.message}\n${planBesideCount(plan, counted)}\n`, {
      fix: fitText(suggestions, budget),
      cause: error,
    });
  }
}

/** Losses without a new checkpoint after which a run is given up. */
const hopelessLosses = 5;
/** Where the devices of a run come from. */
export interface Devices {
  /** Opens the device, also in place of a lost one. */
  readonly open: () => Promise<Device>;
  /** Seconds to wait each time before a lost one is asked for again; default 0, 1, 2, 4, ... 32. */
  readonly pauses?: readonly number[] | undefined;
}

/**
 * Does a run to its end, through losses of the device: on a new one everything is loaded again, and the run goes on from its
 * newest checkpoint, or begins again where there is none, to the bits of a run without a loss.
 * @throws CliError when the device does not come back, or is lost again and again; what `trainOn` throws
 */
export async function trainThroughLosses(context: CommandContext, run: PreparedRun, devices: Devices): Promise<void> {
  const { ui, signal } = context;
  let device = await devices.open();
  let { from } = run;
  let deviceLosses = from?.progress.device_losses ?? 0;
  let again = false;
  for (let inARow = 1; ; inARow++) {
    const reached: { checkpoint?: CheckpointFolder } = {};
    const onCheckpoint = (checkpoint: CheckpointFolder): void => {
      reached.checkpoint = checkpoint;
    };
    try {
      await trainOn(context, device, { ...run, from, deviceLosses, again, onCheckpoint });
      return;
    } catch (error) {
      if (!(error instanceof DeviceLostError) || signal.aborted) throw error;
      deviceLosses++;
      again = true;
      if (reached.checkpoint !== undefined) {
        inARow = 1;
        from = await findCheckpoint(dirname(reached.checkpoint.path), (message) => ui.warn(message));
      }
      const { reason, message } = error;
      if (ui.json)
        ui.data({
          event: 'device_lost',
          reason,
          message,
          device_losses: deviceLosses,
          resume_step: from?.step ?? null,
        });
      if (inARow >= hopelessLosses) {
        throw new CliError(`${message}: for the ${inARow}th time, and no checkpoint was reached in between`, {
          fix: `${lostDeviceFix}${goOn(from)}`,
          cause: error,
        });
      }
      ui.warn(printable(message, 1000));
      ui.note(
        from === undefined
          ? 'opening the device again; there is no checkpoint yet, so the run starts from the beginning'
          : `opening the device again, to go on from step ${from.step}`,
      );
    } finally {
      device.destroy();
    }
    device = await reopened(context, devices, { name: deviceName(device), otherwise: goOn(from) });
  }
}

/** Asks for the device until it is there again, and the same: another would give other bits, or take days. */
async function reopened(
  { ui, signal }: CommandContext,
  { open, pauses = [0, 1, 2, 4, 8, 16, 32] }: Devices,
  { name, otherwise }: { readonly name: string; readonly otherwise: string },
): Promise<Device> {
  let problem = '';
  for (const [i, seconds] of pauses.entries()) {
    if (i > 0) ui.note(`the device is not back yet (${printable(problem, 300)}); trying again in ${seconds} s`);
    await pause(1000 * seconds, undefined, { signal });
    try {
      const device = await open();
      if (deviceName(device) === name) return device;
      problem = `the system offers ${deviceName(device)} in its place`;
      device.destroy();
    } catch (error) {
      problem = errorMessage(error);
    }
  }
  throw new CliError(`the device ${name} was lost and did not come back: ${printable(problem, 300)}`, {
    fix: `\`lorikeet doctor\` shows what there is; a restart of the machine may help.${otherwise}`,
  });
}

const goOn = (from: CheckpointFolder | undefined): string =>
  from === undefined ? '' : ` Go on later with: lorikeet train --resume ${shellQuoted(from.path)}`;
