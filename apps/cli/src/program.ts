/**
 * The command line itself: commands, flags, help, and how errors and interruptions end a run. Each command is one file
 * of commands/, loaded only when it is called.
 */
import { Command, CommanderError, Option } from 'commander';
import pc from 'picocolors';
import { z } from 'zod';
import { configKeys } from './config-schema.js';
import type { CommandContext, Runner } from './context.js';
import { CliError, EXIT, InterruptedError, ReportedError } from './errors.js';
import { byteCount, collect, integer, list, number } from './flag-values.js';
import { type SignalSource, watchInterrupt } from './interrupt.js';
import { addAdapterCommands } from './program-adapter.js';
import { colorsWanted, formatTable, type Io, Ui } from './ui.js';
import { version } from './version.js';

/** What {@link runCli} stands on; tests give their own. */
export interface RunOptions {
  readonly io?: Io;
  readonly signals?: SignalSource;
}

const flags = z.object({ json: z.boolean().default(false), debug: z.boolean().default(false) });

/**
 * Runs one command line.
 * @param args arguments without the interpreter and the script
 * @returns the exit code; nothing is thrown
 */
export async function runCli(args: readonly string[], options: RunOptions = {}): Promise<number> {
  const io: Io = options.io ?? { stdout: process.stdout, stderr: process.stderr, env: process.env };
  // Errors before the flags are parsed obey them too.
  let debug = args.includes('--debug');
  let ui = new Ui(io, { json: args.includes('--json') });

  /** Runs a command with its context; Ctrl-C is watched while it works. */
  const run = async (command: Command, action: (context: CommandContext) => Promise<void>): Promise<void> => {
    const { json, debug: wanted } = flags.parse(command.optsWithGlobals());
    debug = wanted;
    ui = new Ui(io, { json });
    const watch = watchInterrupt(() => ui.note('stopping; press Ctrl-C again to stop at once'), options.signals);
    try {
      await action({ ui, io, signal: watch.signal });
    } catch (error) {
      // What an aborted operation throws says less than why it was aborted.
      throw watch.signal.aborted && !(error instanceof CliError) ? watch.signal.reason : error;
    } finally {
      watch.stop();
    }
  };

  const program = buildProgram(io, run);
  try {
    if (args.length === 0) {
      program.outputHelp({ error: true });
      return EXIT.usage;
    }
    await program.parseAsync([...args], { from: 'user' });
    return EXIT.done;
  } catch (error) {
    // Help and version were asked for and have been printed; commander has printed what is wrong with the flags.
    if (error instanceof CommanderError) return error.exitCode === 0 ? EXIT.done : EXIT.usage;
    ui.clear();
    reportError(error, ui, io, debug);
    return error instanceof CliError ? error.exitCode : EXIT.failed;
  }
}

/** Prints an error: a paragraph for people on stderr, and an object on stdout with `--json`. */
function reportError(error: unknown, ui: Ui, io: Io, debug: boolean): void {
  const message = error instanceof Error ? error.message || error.name : String(error);
  const colors = pc.createColors(colorsWanted(io.stderr, io.env));
  const label = error instanceof InterruptedError ? '' : `${colors.red('error:')} `;
  io.stderr.write(`${label}${message}\n`);
  if (debug) {
    for (let current = error, depth = 0; current instanceof Error && depth < 6; current = current.cause, depth++) {
      io.stderr.write(`${depth === 0 ? '' : 'caused by '}${current.stack ?? current.message}\n`);
    }
  } else if (!(error instanceof CliError) && error instanceof TypeError) {
    io.stderr.write('This looks like a defect of the program; --debug shows where it happened.\n');
  }
  if (!ui.json || error instanceof ReportedError) return;
  const { where, fix } = error instanceof CliError ? error : { where: undefined, fix: undefined };
  ui.data({ error: { message, ...(where === undefined ? {} : { where }), ...(fix === undefined ? {} : { fix }) } });
}

const dtypeOption = (): Option =>
  new Option(
    '--dtype <type>',
    'element type of base weights and activations (default: that of the checkpoint)',
  ).choices(['float32', 'float16']);

const fourBitOption = (): Option =>
  new Option('--load-in-4bit', 'store the linear layers in 4 bits (NF4, double quantisation)');

function buildProgram(io: Io, run: Runner): Command {
  const program = new Command('lorikeet');
  program
    .description('Fine-tunes Mistral-architecture language models on the GPU of this machine, through WebGPU.')
    .version(version(), '-V, --version', 'print the version')
    .helpOption('-h, --help', 'print help')
    .helpCommand('help [command]', 'print help for a command')
    .exitOverride()
    .showHelpAfterError('(--help shows the flags)')
    .configureOutput({
      writeOut: (text) => io.stdout.write(text),
      writeErr: (text) => io.stderr.write(text),
      getOutHasColors: () => colorsWanted(io.stdout, io.env),
      getErrHasColors: () => colorsWanted(io.stderr, io.env),
    })
    .addOption(new Option('--json', 'machine-readable output alone on stdout; human text goes to stderr'))
    .addOption(new Option('--debug', 'show the stack of an error'))
    .addHelpText(
      'after',
      `
Examples:
  lorikeet doctor                                    which GPU, and is it ready
  lorikeet bench                                     how fast it trains and generates
  lorikeet data preview -c run.yaml -n 3             what will be trained, token by token
  lorikeet plan -c run.yaml --budget 8GB             does it fit, and what would make it fit
  lorikeet train -c run.yaml lora.r=16               fine-tune
  lorikeet eval --model ./model --adapter ./out --data test.jsonl --labels negative,neutral,positive
  lorikeet generate --model ./model --adapter ./out --prompt "Answer: "
  lorikeet merge --model ./model --adapter ./out --output ./merged --verify
  lorikeet export --model ./model --adapter ./out --to gguf --output model.gguf
  lorikeet adapter truncate ./out --rank 4 --output ./out-r4

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.`,
    );

  /** Adds a command with the flags that every command has. */
  const add = (parent: Command, name: string, description: string, examples: string): Command =>
    parent
      .command(name)
      .description(description)
      .option('--json', 'machine-readable output alone on stdout; human text goes to stderr')
      .option('--debug', 'show the stack of an error')
      .addHelpText('after', `\nExamples:\n${examples.replace(/^/gm, '  ')}`);

  const withModel = (command: Command): Command =>
    command
      .requiredOption('--model <folder or id>', 'base model: a folder, or an id on the hub')
      .option('--revision <name>', 'branch, tag or commit of the model on the hub')
      .option('--cache-dir <folder>', 'where downloads are kept (default: HF_HOME)')
      .option('--offline', 'use what is in the cache and ask no server');

  add(
    program,
    'train',
    'Fine-tunes a model with LoRA or another adapter as a run file says; key=value arguments override it.',
    `lorikeet train -c run.yaml
lorikeet train -c run.yaml lora.r=16 learning_rate=2e-4 output_dir=out/r16
lorikeet train -c run.yaml --resume              go on with a run that was stopped or killed
lorikeet train --resume out/checkpoint-500       the same, from a certain checkpoint
lorikeet train -c run.yaml --dry-run             print the resolved run and stop
lorikeet train -c run.yaml --json > log.jsonl    one JSON object a log step`,
  )
    .argument('[key=value...]', 'keys of the run file, dotted where they are nested; values are YAML')
    .option('-c, --config <file>', 'run file (YAML)')
    .option('--dry-run', 'print the resolved run and stop')
    .option('--resume [folder]', 'go on from a checkpoint, or the newest of a run (default: that of output_dir)')
    .option('--overwrite', 'replace the run that output_dir holds')
    .addOption(dtypeOption())
    .addOption(fourBitOption())
    .addHelpText('after', () => {
      const rows = configKeys().map(({ key, takes, standard }) => [`  ${key}`, `${takes} (default: ${standard})`]);
      return `\nKeys of the run file:\n${formatTable(rows)}`;
    })
    .action(async (overrides: string[], _options: unknown, command: Command) => {
      await run(command, async (context) => {
        const { runTrain } = await import('./commands/train.js');
        await runTrain(context, overrides, command.opts());
      });
    });

  add(
    program,
    'plan',
    'Says what a run will take, by part, before anything is loaded; with a budget, whether it fits and what would make it fit.',
    `lorikeet plan -c run.yaml
lorikeet plan -c run.yaml --budget 8GB           exit code 1 when it does not fit
lorikeet plan -c run.yaml --budget 8GB gradient_checkpointing=true lora.r=8
lorikeet plan model=mistralai/Mistral-7B-v0.1 dtype=float16 max_length=512 --json`,
  )
    .argument('[key=value...]', 'keys of the run file')
    .option('-c, --config <file>', 'run file (YAML)')
    .option('--budget <bytes>', 'memory that there is, such as 8GB or 7.5GiB (default: memory_limit_gb)', byteCount)
    .option('--no-data', 'read no data: every row has max_length tokens, all of them trained')
    .addOption(dtypeOption())
    .addOption(fourBitOption())
    .action(async (overrides: string[], _options: unknown, command: Command) => {
      await run(command, async (context) => {
        const { runPlan } = await import('./commands/plan.js');
        await runPlan(context, overrides, command.opts());
      });
    });

  add(
    program,
    'eval',
    'Measures a model on labelled rows: loss, accuracy, F1, the share of invalid answers.',
    `lorikeet eval --model ./model --data test.jsonl --labels negative,neutral,positive
lorikeet eval --model ./model --adapter ./out --data test.jsonl --json`,
  )
    .requiredOption('--data <file>', 'rows to measure on (.jsonl, .json, .csv, .tsv, .parquet)')
    .option('--adapter <folder or id>', 'adapter on top of the model')
    .option(
      '--labels <a,b,c>',
      'score these answers instead of generating freely (default: the different answers of the data are the classes)',
      list,
    )
    .option('--output <folder>', 'write eval_results.json and predictions.jsonl here (default: nothing is written)')
    .option('--token-losses <rows>', 'rows whose losses token by token are written too', integer(0), 8)
    .option('--batch-size <rows>', 'rows at a time', integer(1), 8)
    .option('--max-new-tokens <n>', 'longest free answer in tokens', integer(1), 16)
    .option('--limit <rows>', 'use the first rows alone', integer(1))
    .option(
      '-c, --config <file>',
      'run file whose templates are used (default: the adapter’s run.yaml, else what the columns of the data say)',
    )
    .addOption(dtypeOption())
    .addOption(fourBitOption())
    .action(async (_options: unknown, command: Command) => {
      await run(command, async (context) => {
        const { runEval } = await import('./commands/eval.js');
        await runEval(context, command.opts());
      });
    });

  add(
    program,
    'generate',
    'Continues a prompt and streams the text.',
    `lorikeet generate --model ./model --prompt "Once upon a time"
lorikeet generate --model ./model --adapter ./out --prompt "Answer: " --temperature 0 --max-new-tokens 4`,
  )
    .requiredOption('--prompt <text>', 'text to continue; - reads it from stdin')
    .option('--adapter <folder or id>', 'adapter on top of the model')
    .option('--max-new-tokens <n>', 'longest continuation in tokens', integer(1), 128)
    .option('--temperature <t>', '0 is greedy', number(0), 1)
    .option('--top-p <p>', 'smallest set of tokens with this probability', number(0, 1))
    .option('--top-k <k>', 'most probable tokens alone; 0 is all', integer(0))
    .option('--min-p <p>', 'tokens with this share of the largest probability', number(0, 1))
    .option('--repetition-penalty <p>', 'above 1 makes tokens that occurred less likely', number(0.01))
    .option('--seed <n>', 'seed of the draw', integer(0))
    .option('--stop <text>', 'stop behind this text (may be given again)', collect)
    .addOption(dtypeOption())
    .addOption(fourBitOption())
    .action(async (_options: unknown, command: Command) => {
      await run(command, async (context) => {
        const { runGenerate } = await import('./commands/generate.js');
        await runGenerate(context, command.opts());
      });
    });

  add(
    program,
    'merge',
    'Adds an adapter into its base model and writes a model in Hugging Face layout.',
    `lorikeet merge --model ./model --adapter ./out --output ./merged --verify
lorikeet merge --model ./model --adapter ./out --output ./merged --verify-prompts test.jsonl
lorikeet merge --model ./model --adapter ./out --output ./merged --save-in-4bit`,
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
        const { runMerge } = await import('./commands/merge.js');
        await runMerge(context, command.opts());
      });
    });

  add(
    program,
    'export',
    'Writes a model or an adapter as the files of another tool: llama.cpp and Ollama (gguf, gguf-lora), MLX, PEFT.',
    `lorikeet export --model ./model --adapter ./out --to gguf --output model.gguf      merged, f16
lorikeet export --model ./model --to gguf --type q8_0 --output model-q8.gguf
lorikeet export --model ./model --adapter ./out --to gguf-lora --output adapter.gguf
lorikeet export --model ./model --adapter ./out --to mlx --output ./mlx-adapter`,
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
        const { runExport } = await import('./commands/export.js');
        await runExport(context, command.opts());
      });
    });

  for (const command of program.commands) {
    if (['eval', 'generate', 'merge', 'export'].includes(command.name())) withModel(command);
  }

  add(
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
        const { runImport } = await import('./commands/import.js');
        await runImport(context, folder, command.opts());
      });
    });

  add(
    program,
    'bench',
    'Measures training and generation on this device: tokens a second, the time of each kernel, the share of the peak.',
    `lorikeet bench
lorikeet bench --model ./model --batch-size 4 --length 512 --rank 16
lorikeet bench --json > bench.json`,
  )
    .option('--model <folder or id>', 'model to measure (default: a small Mistral of random weights)')
    .option('--revision <name>', 'branch, tag or commit of the model on the hub')
    .option('--cache-dir <folder>', 'where downloads are kept (default: HF_HOME)')
    .option('--offline', 'use what is in the cache and ask no server')
    .option('--batch-size <rows>', 'rows of a training step', integer(1), 4)
    .option('--length <tokens>', 'tokens of a row', integer(2), 128)
    .option('--rank <r>', 'rank of LoRA, on all linear layers', integer(1), 8)
    .option('--new-tokens <n>', 'tokens to generate', integer(1), 32)
    .option('--steps <n>', 'training steps to measure', integer(1), 3)
    .addOption(dtypeOption())
    .action(async (_options: unknown, command: Command) => {
      await run(command, async (context) => {
        const { runBench } = await import('./commands/bench.js');
        await runBench(context, command.opts());
      });
    });

  add(
    program,
    'dashboard',
    'Serves a page on this machine with live curves of runs, their first rows, answers and losses of tokens.',
    `lorikeet dashboard ./out
lorikeet dashboard ./out/r8 ./out/r16            two runs over each other
lorikeet dashboard ./out --port 8080`,
  )
    .argument('<folder...>', 'output folders of runs')
    .option('--port <n>', 'port on 127.0.0.1 (default: any that is free)', integer(0), 0)
    .action(async (folders: string[], _options: unknown, command: Command) => {
      await run(command, async (context) => {
        const { runDashboard } = await import('./commands/dashboard.js');
        await runDashboard(context, folders, command.opts());
      });
    });

  add(
    program,
    'report',
    'Writes report.html of a run anew: the dashboard in one file, which a run writes at its end.',
    'lorikeet report ./out',
  )
    .argument('<folder>', 'output folder of a run')
    .action(async (folder: string, _options: unknown, command: Command) => {
      await run(command, async (context) => {
        const { runReport } = await import('./commands/dashboard.js');
        await runReport(context, folder);
      });
    });

  add(
    program,
    'doctor',
    'Says which GPU there is, what it can do, and what to install when there is none.',
    'lorikeet doctor\nlorikeet doctor --tune      measure anew which kernels are fastest here\nlorikeet doctor --json',
  )
    .option('--tune', 'measure which kernels are fastest on this device, and keep the choice')
    .action(async (_options: unknown, command: Command) => {
      await run(command, async (context) => {
        const { runDoctor } = await import('./commands/doctor.js');
        await runDoctor(context, command.opts());
      });
    });

  const data = program.command('data').description('Looks at training data.');
  add(
    data,
    'preview',
    'Shows rows as the model will see them: which tokens are trained, masked or cut.',
    'lorikeet data preview -c run.yaml -n 3\nlorikeet data preview train_file=train.jsonl model_name_or_path=./model',
  )
    .argument('[key=value...]', 'keys of the run file')
    .option('-c, --config <file>', 'run file (YAML)')
    .option('-n <rows>', 'how many rows', integer(1), 3)
    .action(async (overrides: string[], _options: unknown, command: Command) => {
      await run(command, async (context) => {
        const { runDataPreview } = await import('./commands/data-preview.js');
        await runDataPreview(context, overrides, command.opts());
      });
    });

  add(
    program,
    'inspect',
    'Shows what is in a model, an adapter or a safetensors file; with a second path, how the two differ.',
    `lorikeet inspect ./out                   tensors, ranks, norms, spectrum, checksums
lorikeet inspect ./out ./out2            how two adapters differ
lorikeet inspect ./dora --model ./model  what a DoRA adapter adds to its base
lorikeet inspect model.safetensors --tensors`,
  )
    .argument('<path>', 'folder or .safetensors file')
    .argument('[path2]', 'what to compare it with')
    .option('--tensors', 'list every tensor')
    .option('--no-hash', 'leave the checksums out, which read every byte')
    .option('--model <folder or id>', 'base of a DoRA adapter, on whose weights its update depends')
    .option('--revision <name>', 'branch, tag or commit of the model on the hub')
    .option('--cache-dir <folder>', 'where downloads are kept (default: HF_HOME)')
    .option('--offline', 'use what is in the cache and ask no server')
    .action(async (first: string, second: string | undefined, _options: unknown, command: Command) => {
      await run(command, async (context) => {
        const { runInspect } = await import('./commands/inspect.js');
        await runInspect(context, first, second, command.opts());
      });
    });
  addAdapterCommands(program, add, run);

  return program;
}
