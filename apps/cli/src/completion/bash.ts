/** Completion for bash, 3.2 and newer. */
import { type CompletionTree, type CompletionValue, transitions, word } from './tree.js';

/** The branches of a `case` that complete a value; those that take anything are left out. */
function values(items: readonly (readonly [pattern: string, value: CompletionValue])[]): string {
  return items
    .filter(([, value]) => value.path || value.words.length > 0)
    .map(([pattern, { path, words }]) => `    ${pattern}) words=${word(words.join(' '))}${path ? ' files=1' : ''} ;;\n`)
    .join('');
}

/** The script. */
export function bashCompletion(tree: CompletionTree): string {
  const { program, commands, keys } = tree;
  const flagValues = commands.flatMap(({ path, flags }) =>
    flags.flatMap(({ names, value }) =>
      value === undefined ? [] : [[names.map((name) => word(`${path}:${name}`)).join('|'), value] as const],
    ),
  );
  return `# Completion of ${program} for bash: eval "$(${program} completion bash)"
_${program}() {
  local cur="\${COMP_WORDS[COMP_CWORD]}" prev="\${COMP_WORDS[COMP_CWORD-1]}" path='' key='' before='' words='' files='' ending='' i
  local keys=${word(keys.map(({ name }) => `${name}=`).join(' '))}
  for ((i = 1; i < COMP_CWORD; i++)); do
    case "$path/\${COMP_WORDS[i]}" in
${transitions(tree)
  .map(({ step, to }) => `      ${word(step)}) path=${word(to)} ;;\n`)
  .join('')}    esac
  done
  # key=value comes in one word or in three, as COMP_WORDBREAKS says.
  if [[ $cur == '=' ]]; then key=$prev cur=''
  elif [[ $prev == '=' && $COMP_CWORD -gt 1 ]]; then key="\${COMP_WORDS[COMP_CWORD-2]}"
  elif [[ $cur == *=* ]]; then key="\${cur%%=*}" before="\${cur%%=*}=" cur="\${cur#*=}"
  elif [[ $prev == -* ]]; then key=$prev
  fi
  case "$path:$key" in
${values(flagValues)}  esac
  case "$key" in
${values(keys.map(({ name, value }) => [word(name), value]))}    '') ending=1 ;;
    -*) [[ -z $words$files ]] && ending=1 ;;
  esac
  if [[ -n $ending ]]; then
    case "$path" in
${commands
  .map(({ path, commands: inner, flags, argument, keys: takesKeys }) => {
    const names = [...inner.map(({ name }) => name), ...argument.words];
    const dashes = flags.flatMap((flag) => flag.names);
    const plain = takesKeys ? '$keys' : names.join(' ');
    return `      ${word(path)})
        if [[ $cur == -* ]]; then words=${word(dashes.join(' '))}
        else words="${plain}"${argument.path ? ' files=1' : ''}${takesKeys ? '; compopt -o nospace 2> /dev/null' : ''}; fi ;;\n`;
  })
  .join('')}    esac
  fi
  local IFS=$' \\n'
  COMPREPLY=($(compgen -P "$before" -W "$words" -- "$cur"))
  if [[ -n $files ]]; then
    IFS=$'\\n'
    COMPREPLY+=($(compgen -P "$before" -f -- "$cur"))
    compopt -o filenames 2> /dev/null
  fi
}
complete -F _${program} ${program}
`;
}
