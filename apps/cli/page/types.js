/** What the page is given: JSON from the dashboard's server, or inside a report. Everything but numbers is shown as text. */
export {};
//# sourceMappingURL=types.js.map