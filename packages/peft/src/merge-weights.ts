/** Merging an adapter into weights that come one after another, so that no model is ever there as a whole. */
import { Embedding, Linear, type Module, RMSNorm } from '@lorikeet/nn';
import type { ByteFolder, Tensor } from '@lorikeet/tensor';
import type { InjectOptions } from './create-adapter.js';
import { loadAdapter, loadModule } from './load-adapter.js';
import { AdapterError } from './format.js';

/** An adapter that is merged weight by weight. Open one with `openWeightMerge`. */
export interface WeightMerge {
  /** Whether the adapter changes the parameter of this name. */
  changes(name: string): boolean;
  /**
   * The weight with the adapter's update in it, in f32 or f16 as the weight is; one that the adapter does not change is
   * given back. Takes the weight over, also where it rejects.
   */
  merged(name: string, weight: Tensor): Promise<Tensor>;
}

/** Options of `openWeightMerge`. */
export interface WeightMergeOptions extends InjectOptions {
  /** Called for each weight that is changed with the Frobenius norm of what is added to it. */
  readonly onNorm?: ((path: string, norm: number) => void) | undefined;
}

/**
 * Opens an adapter for merging. Everything is checked before any weight is asked for: every missing, unexpected and
 * mis-shaped tensor is named at once, and methods that cannot be merged are refused.
 * @param model of the base's shape on a device that only plans (`planDevice`, `EmptyWeights`)
 */
export async function openWeightMerge(
  model: Module,
  folder: ByteFolder,
  options: WeightMergeOptions = {},
): Promise<WeightMerge> {
  const adapter = await loadAdapter(model, folder, options);
  adapter.merge();
  const paths = new Set(adapter.layers.keys());
  adapter.remove();
  const pathOf = (name: string): string => name.slice(0, name.lastIndexOf('.'));

  return {
    changes: (name) => paths.has(pathOf(name)),
    async merged(name, weight) {
      const path = pathOf(name);
      if (!paths.has(path)) return weight;
      const module = model.at(path);
      if (!(module instanceof Linear || module instanceof Embedding || module instanceof RMSNorm)) {
        weight.dispose();
        throw new AdapterError(`${path} has no weight of its own that an update could be merged into`);
      }
      const planned = module.weight;
      module.weight = weight;
      try {
        const one = await loadModule(model, folder, path, options);
        try {
          if (options.onNorm !== undefined) {
            for (const [where, norm] of await one.updateNorms()) options.onNorm(where, norm);
          }
        } catch (error) {
          one.remove();
          throw error;
        }
        one.mergeAndUnload();
        return module.weight;
      } catch (error) {
        module.weight.dispose();
        throw error;
      } finally {
        module.weight = planned;
      }
    },
  };
}
