"""Text tables as people save them, with any usual encoding, separator and spacing."""

import codecs
import csv
import io
import re

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from mimref.data.decode import printable
from mimref.errors import DataError

_SEPARATORS = (",", ";", "\t", "|")
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, as it begins with that mark
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_SPREADSHEETS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")


def read_text_table(file: str, known: str) -> tuple[pa.Table, list[str]]:
    """Return a table of text cells, with empty ones as null, and notices. Column names are stripped of blanks.

    known: a column that should exist, by which the separator is recognised. Raises DataError for a spreadsheet and for
    stray quotes, OSError, and pyarrow's errors for rows of unequal length.
    """
    with open(file, "rb") as opened:
        content = opened.read()
    if content.startswith(_SPREADSHEETS):
        raise DataError("is a spreadsheet in spite of its name; save it as CSV (UTF-8)")
    text, notices = _decode(content, printable(file))
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # a cell may be a long text
    if stated := re.match(r"sep=(.)\r?\n", text):  # Excel's way of stating the separator
        text = text[stated.end() :]
    separator = stated[1] if stated else _separator(text, known, tabs=file.lower().endswith(".tsv"))
    if '"' in text:
        text = _rewritten(text, separator, first_line=2 if stated else 1)
    table = _parse(text.encode(), separator)
    return table.rename_columns([name.strip() for name in table.column_names]), notices


def without_blanks(table: pa.Table) -> pa.Table:
    """Strip blanks from text cells, make empty ones null, and drop empty rows at the end.

    Spreadsheets end a table with rows of separators.
    """
    columns = []
    for column in table.columns:
        text = pc.utf8_trim_whitespace(column)
        columns.append(pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text))
    used = table.num_rows
    while used and all(not column[used - 1].is_valid for column in columns):
        used -= 1
    return pa.table(columns, names=table.column_names).slice(0, used)


def _decode(content: bytes, shown: str) -> tuple[str, list[str]]:
    """Return the text of a table, and a notice if it is taken for Windows-1252."""
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            # Of a file that is cut off within a character, what comes before that is kept.
            return content.removeprefix(mark).decode(encoding, "ignore" if "16" in encoding else "strict"), []
    zeros = [content[start:1000:2].count(0) for start in (0, 1)]
    if 4 * max(zeros) > len(content[:1000]):
        # UTF-16 without its mark: the high bytes of Latin letters are zero.
        return content.decode("utf-16-be" if zeros[0] > zeros[1] else "utf-16-le", "ignore"), []
    try:
        return content.decode("utf-8"), []
    except UnicodeDecodeError:
        notice = f"{shown}: not UTF-8, read as Windows-1252 (Western European); save it as UTF-8 if names are wrong"
        return content.decode("cp1252", "replace"), [notice]


def _separator(text: str, known: str, *, tabs: bool) -> str:
    """Return the separator that yields a column `known` in the first line, else the one that yields most columns."""
    first = re.split(r"[\r\n]", text.lstrip("\r\n"), maxsplit=1)[0]

    def columns(separator: str) -> list[str]:
        line = next(csv.reader([first], delimiter=separator, skipinitialspace=True), [])
        return [name.strip().lower() for name in line]

    order = sorted(_SEPARATORS, key=lambda each: each != "\t") if tabs else _SEPARATORS
    return max(order, key=lambda each: (known.lower() in columns(each), len(columns(each))))


def _rewritten(text: str, separator: str, first_line: int) -> str:
    """Return the table as pyarrow needs it: no blanks around quoted cells, every quote closed.

    pyarrow treats a quote after a blank as a plain character, and a quote that is not closed as a cell with all the
    rows that follow. first_line: number of the text's first line in the file. Raises DataError naming such a line.
    """
    text = re.sub(rf'"[^\S\t\r\n]+(?={re.escape(separator)}|[\r\n]|\Z)', '"', text)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    rewritten = io.StringIO()
    writer, begin = csv.writer(rewritten, delimiter=separator), first_line
    try:
        for row in rows:
            if row:
                writer.writerow(row)
            begin = first_line + rows.line_num
    except csv.Error as error:
        raise DataError(
            f"line {begin} has a quote that nothing closes, or text after a quoted cell; write a quote within a cell "
            "twice, and quote that cell"
        ) from error
    return rewritten.getvalue()


def _parse(content: bytes, separator: str) -> pa.Table:
    options = pa.csv.ParseOptions(delimiter=separator, newlines_in_values=True)
    names = pa.csv.open_csv(io.BytesIO(content), parse_options=options).schema.names
    return pa.csv.read_csv(
        io.BytesIO(content),
        parse_options=options,
        # Only empty cells are missing values.
        convert_options=pa.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True, null_values=[""]
        ),
    )
