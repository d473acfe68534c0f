/** Completion for PowerShell, 5.1 and newer. */
import { type CompletionTree, type CompletionValue, transitions } from './tree.js';

/** A text as one word of PowerShell. */
const word = (text: string): string => `'${text.replaceAll("'", "''")}'`;

const listOf = (words: readonly string[]): string => `@(${words.map(word).join(', ')})`;

/** The script. Where nothing is offered, PowerShell completes paths itself. */
export function powershellCompletion(tree: CompletionTree): string {
  const { program, commands, keys } = tree;
  const table = (entries: readonly (readonly [name: string, value: CompletionValue])[]): string =>
    entries
      .filter(([, { words }]) => words.length > 0)
      .map(([name, { words }]) => `    ${word(name)} = ${listOf(words)}\n`)
      .join('');
  const flagValues = commands.flatMap(({ path, flags }) =>
    flags.flatMap(({ names, value }) =>
      value === undefined ? [] : names.map((name) => [`${path}:${name}`, value] as const),
    ),
  );
  const taking = flagValues.map(([name]) => name);
  return `# Completion of ${program} for PowerShell: ${program} completion powershell | Out-String | Invoke-Expression
Register-ArgumentCompleter -Native -CommandName ${program} -ScriptBlock {
  param($typed, $ast, $cursor)
  $steps = @{
${transitions(tree)
  .map(({ step, to }) => `    ${word(step)} = ${word(to)}\n`)
  .join('')}  }
  $values = @{
${table([...flagValues, ...keys.map(({ name, value }) => [name, value] as const)])}  }
  $taking = ${listOf(taking)}
  $flags = @{
${commands.map(({ path, flags }) => `    ${word(path)} = ${listOf(flags.flatMap(({ names }) => names))}\n`).join('')}  }
  $keys = ${listOf(keys.map(({ name }) => `${name}=`))}
  $others = @{
${commands
  .map(({ path, commands: inner, argument, keys: takesKeys }) => {
    const names = [...inner.map(({ name }) => name), ...argument.words];
    return `    ${word(path)} = ${takesKeys ? '$keys' : listOf(names)}\n`;
  })
  .join('')}  }
  $at = ''
  $before = @($ast.CommandElements | Select-Object -Skip 1 | Where-Object { $_.Extent.EndOffset -lt $cursor } | ForEach-Object { $_.ToString() })
  foreach ($each in $before) { if ($steps.ContainsKey("$at/$each")) { $at = $steps["$at/$each"] } }
  $last = if ($before.Count -gt 0) { $before[-1] } else { '' }
  $offered = if ($typed -match '^([^=]+)=') {
    $key = $Matches[1]
    if ($values.ContainsKey($key)) { $values[$key] | ForEach-Object { "$key=$_" } }
  } elseif ($values.ContainsKey("\${at}:$last")) { $values["\${at}:$last"] }
  elseif ($taking -contains "\${at}:$last") { @() }
  elseif ($typed -like '-*') { $flags[$at] }
  else { $others[$at] }
  $offered | Where-Object { $_ -like "$typed*" } | ForEach-Object { [System.Management.Automation.CompletionResult]::new($_, $_, 'ParameterValue', $_) }
}
`;
}
