/** Completion for zsh. */
import { type CompletionTree, type CompletionValue, transitions, word } from './tree.js';

/** Commands that offer a value. */
function offer({ path, words }: CompletionValue): string {
  return [...(words.length > 0 ? [`compadd -- ${words.map(word).join(' ')}`] : []), ...(path ? ['_files'] : [])].join(
    '; ',
  );
}

/** An entry of `_describe`: the name, a colon, the description. */
const entry = (name: string, description: string): string => word(`${name.replaceAll(':', '\\:')}:${description}`);

/** The script. */
export function zshCompletion(tree: CompletionTree): string {
  const { program, commands, keys } = tree;
  const branches = (items: readonly (readonly [pattern: string, value: CompletionValue])[]): string =>
    items
      .map(([pattern, value]) => [pattern, offer(value)])
      .filter(([, action]) => action !== '')
      .map(([pattern, action]) => `      ${pattern}) ${action}; return ;;\n`)
      .join('');
  const flagValues = commands.flatMap(({ path, flags }) =>
    flags.flatMap(({ names, value }) =>
      value === undefined ? [] : [[names.map((name) => word(`${path}:${name}`)).join('|'), value] as const],
    ),
  );
  return `#compdef ${program}
# Completion of ${program} for zsh: eval "$(${program} completion zsh)", or a file _${program} in a folder of $fpath.
_${program}() {
  local at='' key='' i
  local -a list
  for ((i = 2; i < CURRENT; i++)); do
    case "$at/$words[i]" in
${transitions(tree)
  .map(({ step, to }) => `      ${word(step)}) at=${word(to)} ;;\n`)
  .join('')}    esac
  done
  if [[ $words[CURRENT] == *=* ]]; then
    key=\${words[CURRENT]%%=*}
    compset -P '*='
  elif [[ $words[CURRENT-1] == -* ]]; then
    key=$words[CURRENT-1]
  fi
  if [[ -n $key ]]; then
    case "$at:$key" in
${branches(flagValues)}    esac
    case "$key" in
${branches(keys.map(({ name, value }) => [word(name), value]))}    esac
    [[ $key == -* ]] || return
  fi
  case "$at" in
${commands
  .map(({ path, commands: inner, flags, argument, keys: takesKeys }) => {
    const dashes = flags.flatMap(({ names, description }) => names.map((name) => entry(name, description)));
    const others = [
      ...(inner.length > 0
        ? [`list=(${inner.map(({ name, description }) => entry(name, description)).join(' ')}); _describe command list`]
        : []),
      ...(takesKeys ? [`compadd -S '' -- ${keys.map(({ name }) => `${name}=`).join(' ')}`] : []),
      ...(argument.words.length > 0 || argument.path ? [offer(argument)] : []),
    ];
    return `    ${word(path)})
      if [[ $words[CURRENT] == -* ]]; then list=(${dashes.join(' ')}); _describe flag list
      else ${others.length === 0 ? ':' : others.join('; ')}; fi ;;\n`;
  })
  .join('')}  esac
}
if [[ $funcstack[1] == _${program} ]]; then _${program} "$@"; else compdef _${program} ${program}; fi
`;
}
