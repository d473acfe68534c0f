/** Completion for fish. */
import { type CompletionTree, transitions } from './tree.js';

/** A text as one word of fish. */
const word = (text: string): string => `'${text.replaceAll('\\', '\\\\').replaceAll("'", "\\'")}'`;

/** The script. */
export function fishCompletion(tree: CompletionTree): string {
  const { program, commands, keys } = tree;
  const lines = commands.flatMap(({ path, commands: inner, flags, argument, keys: takesKeys }) => {
    const begin = `complete -c ${program} -n ${word(`__${program}_at ${word(path)}`)}`;
    return [
      ...inner.map(({ name, description }) => `${begin} -a ${word(name)} -d ${word(description)}`),
      ...flags.map(({ names, description, value }) => {
        const spelled = names.map((name) => (name.startsWith('--') ? `-l ${name.slice(2)}` : `-s ${name.slice(1)}`));
        const takes =
          value === undefined
            ? ''
            : value.words.length > 0
              ? ` -x -a ${word(value.words.join(' '))}`
              : value.path
                ? ' -r -F'
                : ' -x';
        return `${begin} ${spelled.join(' ')}${takes} -d ${word(description)}`;
      }),
      ...(argument.words.length > 0 ? [`${begin} -a ${word(argument.words.join(' '))}`] : []),
      ...(argument.path ? [`${begin} -F`] : []),
      ...(takesKeys ? [`${begin} -a '(__${program}_keys)'`] : []),
    ];
  });
  const worded = keys
    .filter(({ value }) => value.words.length > 0)
    .map(({ name, value: { words } }) => {
      const printed = words.map((text) => word(`${name}=${text}`)).join(' ');
      return `    case ${word(`${name}=*`)}; printf '%s\\n' ${printed}\n`;
    });
  const paths = keys.filter(({ value }) => value.path && value.words.length === 0);
  return `# Completion of ${program} for fish: ${program} completion fish | source
function __${program}_at
  set -l at ''
  for each in (commandline -opc)[2..-1]
    switch "$at/$each"
${transitions(tree)
  .map(({ step, to }) => `      case ${word(step)}; set at ${word(to)}\n`)
  .join('')}    end
  end
  test "$at" = "$argv[1]"
end
function __${program}_keys
  set -l token (commandline -ct)
  switch "$token"
${worded.join('')}    case ${paths.map(({ name }) => word(`${name}=*`)).join(' ')}
      set -l parts (string split -m 1 = -- $token)
      set -l found $parts[2]*
      test -n "$found"; and printf "$parts[1]=%s\\n" $found
    case '*'; printf '%s=\\n' ${keys.map(({ name }) => name).join(' ')}
  end
end
complete -c ${program} -f
${lines.join('\n')}
`;
}
