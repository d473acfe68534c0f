/** The code of Markdown pages, and what it is to print. */

/** Code of a page, and the line of its first line. */
export interface Code {
  readonly line: number;
  readonly code: string;
}

/** The blocks of a language in a Markdown text. */
export function blocks(markdown: string, language: 'ts' | 'text' | 'sh'): Code[] {
  const found = markdown.matchAll(new RegExp(`^\`\`\`${language}[^\\S\\n]*\\n(.*?)^\`\`\``, 'gms'));
  return [...found].map((match) => ({
    line: markdown.slice(0, match.index).split('\n').length + 1,
    code: match[1],
  }));
}

/** True for a page whose `ts` blocks are one program. */
export const isProgram = (markdown: string): boolean => markdown.startsWith('<!-- program -->\n');

/** The modules of a Markdown text. Lines of a program have the numbers that they have in the text. */
export function modules(markdown: string): Code[] {
  const found = blocks(markdown, 'ts');
  if (!isProgram(markdown)) return found;
  let program = '';
  for (const { line, code } of found) program += '\n'.repeat(line - program.split('\n').length) + code;
  return [{ line: 1, code: program }];
}

const number = /\d+(?:\.(\d+))?/g;

/** Says where two texts differ, if they do; decimal fractions may by one in their last digit, as they do between devices. */
export function difference(printed: string, shown: string): string | undefined {
  const fractions = (text: string): string[] => text.match(number)?.filter((found) => found.includes('.')) ?? [];
  const rest = (text: string): string => text.replace(number, (found) => (found.includes('.') ? '#' : found));
  const [mine, theirs] = [fractions(printed), fractions(shown)];
  const close = mine.every((found, i) => {
    const digits = theirs[i]?.split('.')[1].length;
    return digits === found.split('.')[1].length && Math.abs(Number(found) - Number(theirs[i])) < 1.5 * 10 ** -digits;
  });
  return close && rest(printed) === rest(shown) ? undefined : `printed:\n${printed}\nshown:\n${shown}`;
}
