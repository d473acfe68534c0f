/** Putting adapters of files into a model. */
import type { Module } from '@lorikeet/nn';
import type { ByteFolder } from '@lorikeet/tensor';
import type { Adapter } from './adapter.js';
import { configFile, readConfigText } from './adapter-folder.js';
import { type InjectOptions, startAdapter } from './create-adapter.js';
import { parsePeftConfig } from './peft-method.js';

/**
 * Reads adapter_config.json of a folder, injects that adapter and loads its values. Nothing stays injected on failure.
 * @throws FormatError where a file is broken, AdapterError as `injectAdapter` and `Adapter.load`
 */
export function loadAdapter(model: Module, folder: ByteFolder, options: InjectOptions = {}): Promise<Adapter> {
  return loadModules(model, folder, options);
}

/** @internal Like `loadAdapter`, for one module of those that the adapter changes; the device is that of its weight. */
export function loadModule(model: Module, folder: ByteFolder, path: string, options: InjectOptions): Promise<Adapter> {
  return loadModules(model, folder, options, path);
}

async function loadModules(model: Module, folder: ByteFolder, options: InjectOptions, only?: string): Promise<Adapter> {
  const config = parsePeftConfig(await readConfigText(folder), `${folder.name}/${configFile}`);
  const adapter = await startAdapter(model, config, options, { loading: true, only });
  try {
    await adapter.load(folder);
    return adapter;
  } catch (error) {
    adapter.remove();
    throw error;
  }
}
