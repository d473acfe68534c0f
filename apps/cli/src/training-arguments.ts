/** From a run file to what `train` takes. */
import { totalSteps, type TrainingArguments } from '@lorikeet/trainer';
import type { Config } from './config.js';

/** Steps between two events: a number, or a share of all steps when below 1. */
export function stepsOf(value: number, total: number): number {
  return value < 1 ? Math.max(1, Math.ceil(value * total)) : value;
}

/** The settings of training over so many rows, strategies in steps, and the optimizer steps of the run. */
export function trainingArguments(
  config: Config,
  rows: number,
): { readonly args: TrainingArguments; readonly total: number } {
  const { special_tokens: _tokens, data_seed, eval_steps, save_strategy, ...plain } = config;
  const args = { ...plain, ...(data_seed === null ? {} : { data_seed }) };
  const { perEpoch, total } = totalSteps(rows, args);
  const every = stepsOf(eval_steps ?? config.logging_steps, total);
  return {
    args: {
      ...args,
      eval_steps: { no: 0, steps: every, epoch: perEpoch }[config.eval_strategy],
      eval_delay: config.eval_delay * (config.eval_strategy === 'epoch' ? perEpoch : 1),
      save_steps: { no: 0, best: 0, steps: stepsOf(config.save_steps, total), epoch: perEpoch }[save_strategy],
      save_strategy: save_strategy === 'best' ? 'best' : 'steps',
    },
    total,
  };
}
