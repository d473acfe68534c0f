import { readFile } from 'node:fs/promises';
import { describe, expect, it } from 'vitest';
import { parse } from 'yaml';
import { z } from 'zod';
import { runJsonSchema, runSchemaText, schemaFile } from './config-json-schema.js';
import { keyMeaning } from './config-meanings.js';
import { keyNames } from './config-schema.js';

const schema = z.fromJSONSchema(JSON.parse(runSchemaText()));
const fits = (yaml: string): boolean => schema.safeParse(parse(yaml)).success;

describe('the JSON schema of a run file', () => {
  it('is the published one', async () => {
    // Where it is not: pnpm build; node apps/cli/dist/main.js config schema > apps/cli/run.schema.json; pnpm format
    expect(JSON.parse(await readFile(schemaFile, 'utf8'))).toEqual(JSON.parse(runSchemaText()));
  });

  it('says of every key what it means', () => {
    expect(keyNames().filter((name) => keyMeaning(name) === undefined)).toEqual([]);
    const { properties: { lora, learning_rate } = {} } = runJsonSchema();
    expect(learning_rate).toMatchObject({
      description: 'Learning rate at the peak of the schedule: a number above 0',
      default: 5e-5,
    });
    expect(lora).toMatchObject({
      properties: { r: { description: expect.stringMatching(/^Rank .*1 or more$/), default: 8 } },
    });
  });

  it.each([
    'learning_rate: 2e-4\nlora: {r: 16, target_modules: all-linear, init_lora_weights: pissa}\nsave_steps: 0.1',
    'lora:\nreport_to: none',
    'bottleneck: {kind: pfeiffer}\nreport_to: [jsonl, tensorboard]\ndtype: fp16',
    'model: m\nlora_r: 8\ndevice_map: auto\nlora_parameters: {rank: 8}',
    'lora.r: 8',
  ])('takes %j', (yaml) => expect(fits(yaml)).toBe(true));

  it.each([
    'learning_rat: 2e-4',
    'learning_rate: fast',
    'lora: {r: 0}',
    'lora: {rr: 1}',
    'report_to: carrier pigeon',
    'model: 3',
    'dtype: int8',
  ])('does not take %j', (yaml) => expect(fits(yaml)).toBe(false));
});
