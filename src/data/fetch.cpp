#include "data/fetch.h"

#include <algorithm>
#include <system_error>

#include "core/process.h"
#include "core/progress.h"
#include "data/documents.h"
#include "data/package.h"
#include "data/staging.h"
#include "embedded/html_to_text.py.h"

namespace everlong {
namespace {

enum class Form { kText, kHtml, kGzip };

struct Corpus {
  CorpusInfo info;
  std::vector<std::string> endings;  // of the files to take
  Form form = Form::kText;
  std::string archive = {};    // ending of a tar.xz inside the package that holds the files
  std::string leave_out = {};  // a folder of it
};

// Raised when the same package would give other text: what older rules made is then made anew.
constexpr int kRules = 1;

const std::vector<Corpus>& table() {
  static const std::vector<Corpus> kCorpora = {
      {{"anarchism", "anarchism", "An Anarchist FAQ, prose, 11 MB"}, {".html"}, Form::kHtml},
      {{"gcide", "dict-gcide", "Collaborative International Dictionary of English, 40 MB"},
       {".dict.dz"},
       Form::kGzip},
      // The register tables of one graphics driver are a third of all text of the kernel, and
      // generated.
      {{"linux-source", "linux-source-6.1", "the Linux kernel, C and documentation, 800 MB"},
       {".c", ".h", ".rst"},
       Form::kText,
       ".tar.xz",
       "drivers/gpu/drm/amd/include"},
      {{"perl-doc", "perl-doc", "manuals of Perl, POD, 9 MB"}, {".pod"}},
      {{"postgresql-doc", "postgresql-doc-15", "manual of PostgreSQL, 7 MB"},
       {".html"},
       Form::kHtml},
      {{"python-doc", "python3.11-doc", "manuals of Python, reStructuredText, 11 MB"},
       {".rst.txt"}},
      {{"vim-doc", "vim-doc", "manuals of Vim, 10 MB"}, {".html"}, Form::kHtml},
  };
  return kCorpora;
}

Result<const Corpus*> find_corpus(const std::string& name) {
  std::vector<std::string> names;
  for (const auto& corpus : table()) {
    if (corpus.info.name == name) return &corpus;
    names.push_back(corpus.info.name);
  }
  const std::string near = nearest(name, names);
  return invalid_argument("\"", name, "\" is not a known text; known: ", join(names, ", "),
                          near.empty() ? "" : cat(". Did you mean \"", near, "\"?"));
}

std::string source_text(const Corpus& corpus, const FetchReport& report) {
  return cat(kSourceMarker, "\npackage: ", corpus.info.package, "\nversion: ", report.version,
             "\nrules: ", kRules, "\nfiles: ", report.files, "\nbytes: ", report.bytes, "\n");
}

// What the note of an earlier fetch says; nothing when it is of other rules or another package.
bool read_source(const std::string& text, const Corpus& corpus, FetchReport& report) {
  const auto value = [&](std::string_view key) {
    const auto at = text.find(cat("\n", key, ": "));
    if (at == std::string::npos) return std::string();
    const auto begin = at + key.size() + 3;
    return text.substr(begin, text.find('\n', begin) - begin);
  };
  report.version = value("version");
  report.files = parse_count(value("files")).value_or(0);
  report.bytes = parse_count(value("bytes")).value_or(0);
  return text == source_text(corpus, report);
}

// Regular files below `folder` that the corpus wants, relative to it, by name.
Result<std::vector<fs::path>> select(const fs::path& folder,
                                     const std::vector<std::string>& endings,
                                     const std::string& leave_out) {
  std::vector<fs::path> found;
  std::error_code error;
  fs::recursive_directory_iterator entry(folder, error), end;
  for (; !error && entry != end; entry.increment(error)) {
    const std::string name = entry->path().filename().string();
    const fs::path relative = entry->path().lexically_relative(folder);
    if (!leave_out.empty() && relative.string().find(leave_out) != std::string::npos) continue;
    if (!fs::is_regular_file(entry->symlink_status(error)) || name.find('\n') != std::string::npos)
      continue;
    if (std::any_of(endings.begin(), endings.end(),
                    [&](const auto& ending) { return name.ends_with(ending); }))
      found.push_back(relative);
  }
  if (error) return io_error(folder.string(), ": cannot be read: ", error.message());
  std::sort(found.begin(), found.end());
  return found;
}

// The deepest folder that holds all of them: usr/share/doc/... says nothing.
fs::path common_folder(const std::vector<fs::path>& files) {
  fs::path common = files.front().parent_path();
  for (const auto& file : files) {
    const auto [stop, ignored] =
        std::mismatch(common.begin(), common.end(), file.begin(), file.end());
    fs::path shared;
    for (auto part = common.begin(); part != stop; ++part) shared /= *part;
    common = shared;
  }
  return common;
}

Status copy_files(const fs::path& from, const std::vector<fs::path>& files, const fs::path& to,
                  Progress& progress) {
  for (std::size_t i = 0; i < files.size(); ++i) {
    EVERLONG_RETURN_IF_ERROR(make_directories((to / files[i]).parent_path()));
    std::error_code error;
    fs::copy_file(from / files[i], to / files[i], error);
    if (error) return io_error((to / files[i]).string(), ": cannot be written: ", error.message());
    progress.update(static_cast<std::int64_t>(i) + 1);
  }
  return {};
}

Status convert_html(const fs::path& from, const std::vector<fs::path>& files, const fs::path& to,
                    Progress& progress) {
  std::string list;
  for (const auto& file : files) list += file.string() + "\n";
  const fs::path list_file = to.parent_path() / "pages";
  EVERLONG_RETURN_IF_ERROR(write_file(list_file, list));
  std::int64_t done = 0;
  Process python{{"python3", "-", from.string(), to.string(), list_file.string()}};
  python.input = kHtmlToText;
  python.output = [&](std::string_view lines) {
    done += std::count(lines.begin(), lines.end(), '\n');
    progress.update(done);
    return Status();
  };
  const auto result = run_process(python);
  if (!result.ok()) return program_missing(result.status(), "turning HTML into text", "python3");
  if (result->exit_code == 0 && done == static_cast<std::int64_t>(files.size())) return {};
  const auto tail = result->errors.substr(result->errors.size() -
                                          std::min<std::size_t>(result->errors.size(), 300));
  return io_error("turning HTML into text: python3 failed after ", done, " of ", files.size(),
                  " pages: ", tail);
}

Status unpack_gzip(const fs::path& from, const std::vector<fs::path>& files, const fs::path& to,
                   Progress& progress) {
  for (std::size_t i = 0; i < files.size(); ++i) {
    const fs::path path = to / fs::path(files[i]).replace_extension().replace_extension(".txt");
    EVERLONG_RETURN_IF_ERROR(make_directories(path.parent_path()));
    EVERLONG_ASSIGN(auto file, AtomicFile::create(path));
    Process gzip{{"gzip", "-dc", (from / files[i]).string()}};
    gzip.output = [&](std::string_view text) { return file.write(text); };
    const auto result = run_process(gzip);
    if (!result.ok()) return program_missing(result.status(), "unpacking", "gzip");
    if (result->exit_code != 0)
      return io_error(files[i].string(), ": gzip failed: ", result->errors);
    EVERLONG_RETURN_IF_ERROR(file.commit());
    progress.update(static_cast<std::int64_t>(i) + 1);
  }
  return {};
}

// The files of a tar.xz inside the package, in place of the package's own.
Status unpack_archive(const Corpus& corpus, const fs::path& work, fs::path& folder) {
  EVERLONG_ASSIGN(const auto archives, select(folder, {corpus.archive}, ""));
  if (archives.empty())
    return not_found("package ", corpus.info.package, " holds no ", corpus.archive, " file");
  const fs::path to = work / "archive";
  EVERLONG_RETURN_IF_ERROR(make_directories(to));
  std::vector<std::string> command = {"tar", "-xJf",      (folder / archives[0]).string(),
                                      "-C",  to.string(), "--wildcards"};
  for (const auto& ending : corpus.endings) command.push_back(cat("*", ending));
  folder = to;
  return run_step(command, cat("unpacking ", archives[0].filename().string()), "tar xz-utils");
}

}  // namespace

std::vector<CorpusInfo> known_corpora() {
  std::vector<CorpusInfo> infos;
  for (const auto& corpus : table()) infos.push_back(corpus.info);
  return infos;
}

Result<FetchReport> fetch(const std::string& name, const fs::path& out,
                          const FetchOptions& options) {
  EVERLONG_ASSIGN(const Corpus* corpus, find_corpus(name));
  const auto say = [&](const std::string& line) {
    if (options.say) options.say(line);
  };
  FetchReport report{name, corpus->info.package, "", out / name, 0, 0, false};
  const fs::path source = report.folder / "SOURCE.txt";
  if (fs::exists(report.folder)) {
    const auto text = read_file(source);
    if (!text.ok() || !text->starts_with(kSourceMarker))
      return invalid_argument(report.folder.string(),
                              ": is there and was not made by fetch (no SOURCE.txt of its making); "
                              "choose another --out, or move it away");
    report.already_there = read_source(*text, *corpus, report);
    if (report.already_there && !options.force) return report;
    report.already_there = false;
  }

  EVERLONG_ASSIGN(const auto staging, StagingFolder::create(out, name));
  const fs::path& work = staging.path();
  say(cat("downloading package ", corpus->info.package));
  EVERLONG_ASSIGN(const auto package, download_package(corpus->info.package, work));
  report.version = package.version;
  fs::path from = package.folder;
  if (!corpus->archive.empty()) {
    say(cat("unpacking ", corpus->info.package, " ", report.version));
    EVERLONG_RETURN_IF_ERROR(unpack_archive(*corpus, work, from));
  }
  EVERLONG_ASSIGN(auto files, select(from, corpus->endings, corpus->leave_out));
  if (files.empty())
    return not_found("package ", corpus->info.package, " ", report.version, " holds no ",
                     join(corpus->endings, ", "), " file; this program knows it otherwise");
  const fs::path common = common_folder(files);
  from /= common;
  for (auto& file : files) file = file.lexically_relative(common.empty() ? "." : common);

  say(cat(corpus->form == Form::kText ? "copying " : "turning into text: ", files.size(),
          " files"));
  const fs::path text = work / "text";
  EVERLONG_RETURN_IF_ERROR(make_directories(text));
  {
    Progress progress(cat("fetch ", name), static_cast<std::int64_t>(files.size()), "files");
    const auto convert = corpus->form == Form::kText   ? copy_files
                         : corpus->form == Form::kHtml ? convert_html
                                                       : unpack_gzip;
    EVERLONG_RETURN_IF_ERROR(convert(from, files, text, progress));
  }
  EVERLONG_ASSIGN(const auto made, select(text, {""}, ""));
  for (const auto& file : made) {
    std::error_code error;
    report.bytes += static_cast<std::int64_t>(fs::file_size(text / file, error));
  }
  report.files = static_cast<std::int64_t>(made.size());
  EVERLONG_RETURN_IF_ERROR(write_file(text / "SOURCE.txt", source_text(*corpus, report)));
  // What was there goes with the staging folder.
  if (fs::exists(report.folder))
    EVERLONG_RETURN_IF_ERROR(move_into_place(report.folder, work / "old"));
  EVERLONG_RETURN_IF_ERROR(move_into_place(text, report.folder));
  return report;
}

}  // namespace everlong
