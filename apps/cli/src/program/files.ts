/** The commands that read and write files of models and adapters. */
import { type Command, Option } from 'commander';
import type { Runner } from '../context.js';
import { list, number } from '../flag-values.js';
import { addCommand, dtypeOption, withHub, withModel } from './shared.js';

/** Adds `merge`, `export`, `import` and `inspect`. */
export function addFileCommands(program: Command, run: Runner): void {
  withModel(
    addCommand(
      program,
      'merge',
      'Adds an adapter into its base model and writes a model in Hugging Face layout.',
      `lorikeet merge --model ./model --adapter ./out --output ./merged --verify
lorikeet merge --model ./model --adapter ./out --output ./merged --verify-prompts test.jsonl
lorikeet merge --model ./model --adapter ./out --output ./merged --save-in-4bit`,
    ),
  )
    .requiredOption('--adapter <folder or id>', 'adapter to add')
    .requiredOption('--output <folder>', 'folder of the merged model; must be new or empty')
    .option(
      '--verify',
      'compare the merged model with base and adapter, each held whole: largest difference of logits, changed answers',
    )
    .option('--verify-prompts <file>', 'compare on the rows of this data file, and their labels where they have some')
    .option('--labels <a,b,c>', 'labels to compare; without them the answers in the data', list)
    .option('--load-in-4bit', 'merge into what 4 bits hold of the base (default: as the adapter was trained)')
    .option('--no-load-in-4bit', 'merge into the weights of the base as they are stored')
    .option('--save-in-4bit', 'store the linear layers of the merged model in 4 bits, as bitsandbytes does')
    .option('--max-shard-size <GB>', 'largest file in GB', number(0.001), 5)
    .addOption(dtypeOption())
    .action(async (_options: unknown, command: Command) => {
      await run(command, async (context) => {
        const { runMerge } = await import('../commands/merge.js');
        await runMerge(context, command.opts());
      });
    });

  withModel(
    addCommand(
      program,
      'export',
      'Writes a model or an adapter as the files of another tool: llama.cpp and Ollama (gguf, gguf-lora), MLX, PEFT.',
      `lorikeet export --model ./model --adapter ./out --to gguf --output model.gguf      merged, f16
lorikeet export --model ./model --to gguf --type q8_0 --output model-q8.gguf
lorikeet export --model ./model --adapter ./out --to gguf-lora --output adapter.gguf
lorikeet export --model ./model --adapter ./out --to mlx --output ./mlx-adapter`,
    ),
  )
    .addOption(
      new Option('--to <format>', 'what to write').choices(['gguf', 'gguf-lora', 'mlx', 'peft']).makeOptionMandatory(),
    )
    .requiredOption('--output <file or folder>', 'a new file (gguf, gguf-lora) or folder (mlx, peft)')
    .option('--adapter <folder or id>', 'adapter to write; with --to gguf it is merged into the model')
    .addOption(
      new Option(
        '--type <type>',
        'storage of the weights in GGUF (default: f16 of a model, f32 of an adapter)',
      ).choices(['f16', 'q8_0', 'q4_0', 'f32']),
    )
    .option(
      '--load-in-4bit',
      'with --to gguf: merge into what 4 bits hold of the base (default: as the adapter was trained)',
    )
    .option('--no-load-in-4bit', 'with --to gguf: merge into the weights of the base as they are stored')
    .option('--pre-tokenizer <name>', 'llama.cpp’s name of a byte-level pre-tokenizer that is not known here')
    .action(async (_options: unknown, command: Command) => {
      await run(command, async (context) => {
        const { runExport } = await import('../commands/export.js');
        await runExport(context, command.opts());
      });
    });

  addCommand(
    program,
    'import',
    'Makes a PEFT adapter of an adapter of another tool.',
    'lorikeet import --from mlx ./mlx-adapter --output ./adapter',
  )
    .argument('<folder>', 'adapter of mlx-lm: adapters.safetensors and adapter_config.json')
    .addOption(new Option('--from <format>', 'what it is').choices(['mlx']).makeOptionMandatory())
    .requiredOption('--output <folder>', 'folder of the adapter; must be new or empty')
    .action(async (folder: string, _options: unknown, command: Command) => {
      await run(command, async (context) => {
        const { runImport } = await import('../commands/import.js');
        await runImport(context, folder, command.opts());
      });
    });

  withHub(
    addCommand(
      program,
      'inspect',
      'Shows what is in a model, an adapter or a safetensors file; with a second path, how the two differ.',
      `lorikeet inspect ./out                   tensors, ranks, norms, spectrum, checksums
lorikeet inspect ./out ./out2            how two adapters differ
lorikeet inspect ./dora --model ./model  what a DoRA adapter adds to its base
lorikeet inspect model.safetensors --tensors`,
    ),
  )
    .argument('<path>', 'folder or .safetensors file')
    .argument('[path2]', 'what to compare it with')
    .option('--tensors', 'list every tensor')
    .option('--no-hash', 'leave the checksums out, which read every byte')
    .option('--model <folder or id>', 'base of a DoRA adapter, on whose weights its update depends')
    .option('--revision <name>', 'branch, tag or commit of the model on the hub')
    .action(async (first: string, second: string | undefined, _options: unknown, command: Command) => {
      await run(command, async (context) => {
        const { runInspect } = await import('../commands/inspect.js');
        await runInspect(context, first, second, command.opts());
      });
    });
}
