/** `lorikeet import`: adapters of other tools as PEFT adapters. */
import { readMlxAdapter, writeLoraFile } from '@lorikeet/peft';
import { createFolder, openFolder } from '@lorikeet/tensor/node';
import type { CommandContext } from '../context.js';
import { formatCount, printable } from '../text.js';
import { writeFolderAtomic } from '../write.js';
import { checkEmpty } from './merge.js';

/** Options of the command. */
export interface ImportOptions {
  readonly from: 'mlx';
  readonly output: string;
}

/** Runs the command on the adapter in a folder. */
export async function runImport({ ui }: CommandContext, folder: string, options: ImportOptions): Promise<void> {
  const { output } = options;
  await checkEmpty(output);
  const file = await readMlxAdapter(openFolder(folder));
  await writeFolderAtomic(output, async (temporary) => {
    await writeLoraFile(createFolder(temporary), file);
  });
  const { r, lora_alpha: alpha, base_model_name_or_path: base, target_modules: targets } = file.config;
  if (ui.json) ui.data({ output, updates: file.updates.length, r, lora_alpha: alpha, target_modules: targets, base });
  ui.line(
    `adapter saved in ${printable(output)} (${formatCount(file.updates.length)} linear layers, r ${r}, alpha ${alpha}` +
      `${base === null ? '' : `, made for ${printable(base)}`})`,
  );
}
