/** What a run writes into its folder: checkpoints on the way, and its results. */
import { copyFile } from 'node:fs/promises';
import { join } from 'node:path';
import type { Mistral } from '@lorikeet/mistral';
import type { Adapter } from '@lorikeet/peft';
import { type JsonValue, parseJson } from '@lorikeet/tensor';
import { createFolder } from '@lorikeet/tensor/node';
import type { CheckpointRecord } from '@lorikeet/trainer';
import { checkpointPath, rotateCheckpoints, type RunProgress, writeCheckpointFolder } from '../checkpoint.js';
import { type Config, dumpConfig } from '../config.js';
import { runAdapter } from '../config-adapter.js';
import { modelCard } from '../model-card.js';
import { inFourBits } from '../plan-settings.js';
import type { LogWindow } from '../reporting/reporter.js';
import { writeRunFiles, writeTokenizer } from '../run-files.js';
import { deviceName } from '../session.js';
import { version, versions } from '../version.js';
import { writeFileAtomic } from '../write.js';
import { dtypeName, type Evaluation, type Progressed, type RunFrame } from './frame.js';

/** What a run trains, and how the base did before. */
export interface Trained {
  readonly model: Mistral;
  readonly adapter: Adapter;
  readonly before: Evaluation | undefined;
}

/** Where the loop of a run stands beside what `train` knows of it. */
export interface Standing {
  readonly since: LogWindow;
  readonly last: Progressed;
  /** Steps in a row without a finite gradient. */
  readonly barren: number;
}

/** How a run ended. */
export interface Ending {
  readonly last: Progressed;
  /** Early stopping ended it. */
  readonly stoppedEarly: boolean;
  /** Step of the checkpoint that the adapter was taken back to. */
  readonly best: number | undefined;
}

/** The run as it is to be read again. */
function resolvedConfig({ config, data }: RunFrame, model: Mistral): Config {
  return {
    ...config,
    dtype: dtypeName(model),
    // The data's columns chose it; the same is to be used whatever columns come later.
    prompt_template: config.prompt_template ?? data.template.name,
    resume_from_checkpoint: null,
  };
}

/** Writes a checkpoint and removes old ones; its path. */
export async function writeCheckpoint(
  frame: RunFrame,
  record: CheckpointRecord,
  { model, adapter, before }: Trained,
  { since, last, barren }: Standing,
): Promise<string> {
  const { config } = frame;
  const { train: trained, validation, tokenizer } = frame.data;
  const progress: RunProgress = {
    config: { ...config },
    base: await frame.base(),
    dtype: dtypeName(model),
    device: deviceName(frame.device),
    version: version(),
    data: {
      train_rows: trained.report.kept,
      train_hash: frame.dataHashes().train,
      validation_rows: validation?.report.kept ?? 0,
      validation_hash: frame.dataHashes().validation,
    },
    before: before ?? null,
    window: since.sums,
    last,
    started: frame.started,
    wall_seconds: frame.wallSeconds(),
    barren,
    resumed: frame.resumed(),
    device_losses: frame.deviceLosses,
  };
  const caller: JsonValue = parseJson(JSON.stringify(progress), 'progress');
  const path = checkpointPath(config.output_dir, record.step);
  await writeCheckpointFolder(path, async (folder) => {
    await writeTokenizer(folder, tokenizer);
    await writeFileAtomic(join(folder, 'run.yaml'), dumpConfig(resolvedConfig(frame, model)));
    await copyFile(join(config.output_dir, 'train_log.jsonl'), join(folder, 'train_log.jsonl'));
    await adapter.save(createFolder(folder), { resumable: true });
    await record.write(createFolder(folder), caller);
  });
  await rotateCheckpoints(config.output_dir, config.save_total_limit ?? Infinity, {
    newest: record.step,
    best: record.bestStep,
  });
  return path;
}

/** Writes the adapter and all that says what it is; run.json comes last. */
export async function writeResults(
  frame: RunFrame,
  { model, adapter, before }: Trained,
  { last, stoppedEarly, best }: Ending,
  after: Evaluation | undefined,
): Promise<void> {
  const { config } = frame;
  const { template, train: trained, validation, rows, tokenizer, added } = frame.data;
  const { trainable, total } = adapter.trainableReport();
  const resolved = resolvedConfig(frame, model);
  const results = (value: Evaluation | undefined): Record<string, number> | undefined =>
    value === undefined
      ? undefined
      : { eval_loss: value.loss, eval_mean_token_accuracy: value.tokenAccuracy, eval_tokens: value.supervisedTokens };
  const seconds = frame.wallSeconds();
  const resumed = frame.resumed();
  await writeRunFiles(config.output_dir, {
    adapter,
    tokenizer,
    config: resolved,
    card: modelCard({
      config: resolved,
      baseModel: frame.files.name,
      baseIsHubId: frame.files.folder !== frame.files.name && /^[\w.-]+\/[\w.-]+$/.test(frame.files.name),
      trainable,
      total,
      steps: last.step,
      totalSteps: frame.total,
      trainRows: trained.report.kept,
      validationRows: validation?.report.kept ?? 0,
      addedTokens: added.map((token) => token.content),
      template: resolved.prompt_template ?? template.name,
      device: deviceName(frame.device),
      version: version(),
      before,
      after,
    }),
    ...(after === undefined ? {} : { evaluation: { before: results(before), after: results(after) } }),
    record: {
      status: last.step < frame.total && !stoppedEarly ? 'interrupted' : 'done',
      ...(stoppedEarly ? { stopped_early: true } : {}),
      ...(best === undefined ? {} : { best_step: best }),
      started: frame.started,
      seconds,
      ...(resumed.length === 0 ? {} : { resumed_from_steps: resumed }),
      ...(frame.deviceLosses === 0 ? {} : { device_losses: frame.deviceLosses }),
      step: last.step,
      total_steps: frame.total,
      skipped_steps: last.skippedSteps,
      peak_memory_bytes: last.peakBytes,
      planned_memory_bytes: frame.plan.peakBytes,
      versions: versions(),
      device: frame.device.info,
      seed: config.seed,
      data_seed: config.data_seed ?? config.seed,
      model: {
        name: frame.files.name,
        revision: config.revision,
        parameters: total - trainable,
        vocab_size: model.vocabSize,
        dtype: dtypeName(model),
        load_in_4bit: inFourBits(config, frame.files),
      },
      method: runAdapter(config).section,
      trainable_parameters: trainable,
      added_tokens: added.map(({ id, content }) => ({ id, content })),
      data: {
        files: [...new Set([...rows.files.train, ...rows.files.validation])],
        train_rows: trained.report.kept,
        train_tokens: trained.report.tokens,
        train_hash: frame.dataHashes().train,
        validation_from: rows.validationSource,
        validation_rows: validation?.report.kept ?? 0,
        validation_hash: frame.dataHashes().validation,
        dropped_rows: trained.report.dropped,
        truncated_rows: trained.report.truncated,
      },
    },
  });
}
