// How Sphinx's search orders its results. Titles are questions: a title that holds the whole query comes first, and
// then titles that hold most of its words.
const wordsInTitle = (title) => {
  const query = new URLSearchParams(window.location.search).get("q") || "";
  const stemmer = new Stemmer();
  const words = splitQuery(query.toLowerCase()).filter((word) => !stopwords.has(word));
  const inTitle = new Set(splitQuery(title.toLowerCase()).map((word) => stemmer.stemWord(word)));
  return words.filter((word) => inTitle.has(stemmer.stemWord(word))).length;
};

var Scorer = {
  score: ([docname, title, anchor, descr, score, filename, kind]) =>
    score + (kind === "title" ? 100 : 10 * wordsInTitle(title)),
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
