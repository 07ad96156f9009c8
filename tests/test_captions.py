"""Captions of a dataset: JSON files, text files, folders beside the audio, and tags of the audio files.

Which files, which priority and which values are facts of `extract_tags` in two scripts. They are
services/sa3/dataset_processing/pre_encode.py of betweentwomidnights/gary-localhost-installer at commit 6081cab, and
optimized/mlx/scripts/pre_encode_mlx.py of Stability-AI/stable-audio-3 at commit cf8194c. Both read NAME.json beside the
audio, then ../json/NAME.json, then NAME.txt, then ../txt/NAME.txt. The first script reads the tags title, artist,
album, genre, label, date, composer and bpm last.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
import tracemalloc
import unicodedata

import pytest
import soundfile as sf
from helpers import KINDS, FakeBackend, assert_one_line, noise
from hostile import mutated_bytes
from test_dataset import FIELDS, command, pair, rows_of, run, write_clip

from samekit import AutoencoderModel
from samekit.dataset.captions import RESERVED_FIELDS, read_tags
from samekit.dataset.captions import TAGS as CAPTION_TAGS
from samekit.dataset.check import verify
from samekit.errors import InputError, OutputError


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def audio(path, seed=0):
    return write_clip(path, 100, caption=None, seed=seed)


def prompt_of(out):
    """Return the prompt of the first clip, and where it was found."""
    info = pair(out, 0)[1]
    (row,) = rows_of(out).values()
    assert row.caption_source == info["caption_source"]
    return info["prompt"], info["caption_source"]


# --- Priority ---------------------------------------------------------------------------------------------------


def test_captions_are_found_in_the_order_of_trainers(data, out):
    audio(data / "wav" / "a.wav")
    captions = [data / "wav/a.json", data / "json/a.json", data / "wav/a.txt", data / "txt/a.txt"]
    for path in captions:
        write_json(path, {"prompt": str(path)} if path.suffix == ".json" else str(path))
    for path in captions:
        assert run(data, out).encoded == 1
        assert prompt_of(out) == (str(path), path.suffix[1:])
        assert run(data, out).unchanged == 1
        path.unlink()
    with pytest.raises(InputError, match="none of 1 audio files has a caption"):
        run(data, out)


def test_order_of_sources_is_the_option(data, out):
    audio(data / "a.wav")
    write_json(data / "a.json", {"prompt": "from json"})
    (data / "a.txt").write_text("from txt")
    for captions, expected in (
        (("txt", "json"), "txt"),
        (("json",), "json"),
        (("txt",), "txt"),
        (("json", "txt"), "json"),
    ):
        assert run(data, out, captions=captions).encoded == 1
        assert prompt_of(out) == (f"from {expected}", expected)


@pytest.mark.parametrize("checksum", [False, True])
def test_caption_that_appears_at_a_higher_priority_is_taken(data, out, checksum):
    audio(data / "wav" / "a.wav")
    write_json(data / "txt" / "a.txt", "first")
    for path, value in (("wav/a.txt", "second"), ("json/a.json", {"prompt": "third"}), ("wav/a.json", {"prompt": "4"})):
        assert run(data, out, checksum=checksum).clips == 1
        assert run(data, out, checksum=checksum).unchanged == 1
        write_json(data / path, value)
    assert run(data, out, checksum=checksum).encoded == 1
    assert prompt_of(out) == ("4", "json")


def test_checksum_compares_the_contents_of_all_caption_files(data, out):
    audio(data / "a.wav")
    write_json(data / "a.json", {"bpm": 120})
    (data / "a.txt").write_text("words")
    assert run(data, out, checksum=True).encoded == 1
    for name in ("a.json", "a.txt"):
        os.utime(data / name, ns=(1, 1))
        assert run(data, out, checksum=True).unchanged == 1
    status = (data / "a.json").stat()
    (data / "a.json").write_text('{"bpm": 121}')
    os.utime(data / "a.json", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert run(data, out, checksum=True).encoded == 1
    assert pair(out, 0)[1]["bpm"] == 121


def test_manifest_of_an_older_samekit_stays_valid(data, out):
    """It had one caption file for each clip, and its row has the size and time of that file."""
    audio(data / "a.wav")
    (data / "a.txt").write_text("words")
    run(data, out)
    manifest = out / ".samekit" / "manifest-000001.jsonl"
    header, row = map(json.loads, manifest.read_text().splitlines())
    header["format"] = 1
    for name in ("layout", "cut"):
        value = header.pop(name)
    header["cut"] = {name: value[name] for name in ("sample_size", "pad", "full", "crop", "seed")}
    (((source, *stamp),)) = row.pop("captions")
    row["caption"] = stamp
    assert (source, row.pop("caption_source"), row.pop("cut")) == ("txt", "txt", False)
    manifest.write_text(f"{json.dumps(header)}\n{json.dumps(row)}\n")
    assert verify(out) == []
    assert run(data, out).unchanged == 1
    (data / "a.txt").write_text("other words")
    assert run(data, out).encoded == 1


def test_captions_are_no_files_that_were_passed_over(data, out):
    for name in ("one", "two"):
        audio(data / "sub" / f"{name}.wav", seed=len(name))
    write_json(data / "sub" / "one.json", {"prompt": "one"})
    write_json(data / "json" / "two.json", {"prompt": "two"})
    write_json(data / "json" / "three.json", {"prompt": "three"})
    report = run(data, out)
    assert (report.encoded, report.passed_over) == (2, {".json": 1})
    assert run(data, out.with_name("again"), captions=("json",)).passed_over == {".json": 1}


@pytest.mark.parametrize("listed", [False, True])
def test_names_of_other_normal_forms_in_all_places(data, out, listed):
    name = unicodedata.normalize("NFD", "Café")
    audio(data / "sub" / f"{name}.wav")
    write_json(data / "json" / f"{unicodedata.normalize('NFC', name)}.json", {"prompt": "found"})
    if listed:
        (data / "filelist.txt").write_text(f"sub/{name}.wav\n", encoding="utf-8")
    run(data, out)
    assert prompt_of(out) == ("found", "json")


def test_folders_of_captions_are_listed_once(data, out, monkeypatch):
    for index in range(40):
        audio(data / f"sub{index}" / "a.wav", seed=index)
    write_json(data / "txt" / "a.txt", "the same words")
    listed, listdir = [], os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: listed.append(str(path)) or listdir(path))
    assert run(data, out).encoded == 40
    assert sum(path.endswith("txt") for path in listed) <= 1


# --- JSON -------------------------------------------------------------------------------------------------------


def test_fields_of_json_are_kept(data, out):
    audio(data / "a.wav")
    values = {"prompt": " as it is\r\n", "bpm": 120, "gain": -1.5, "zero": 0, "key": "Ab minor", "ümlaut": "日本"}
    others = {"list": [1], "object": {"a": 1}, "yes": True, "none": None, "blank": " ", "": "nameless"}
    write_json(data / "a.json", values | others)
    run(data, out)
    info = pair(out, 0)[1]
    assert {name: info[name] for name in values} == values
    assert set(info) == FIELDS | set(values)
    assert verify(out) == []


@pytest.mark.parametrize("layout", ["numbered", "mirror"])
def test_fields_of_samekit_win(data, out, layout):
    """`__reject__` makes the reference's dataset leave a clip out."""
    audio(data / "a.wav")
    options = {"layout": layout, "target_latent_rms": 0.1, "flip": "random"}
    write_json(data / "a.json", {"prompt": "words"})
    run(data, out, **options)
    file = out / ("a.json" if layout == "mirror" else "000000000000.json")
    first = json.loads(file.read_text())
    assert set(first) - {"prompt"} <= RESERVED_FIELDS
    write_json(data / "a.json", {"prompt": "words", "__reject__": 1, **dict.fromkeys(RESERVED_FIELDS, "theirs")})
    assert run(data, out, **options).encoded == 1
    assert json.loads(file.read_text()) == first
    assert verify(out) == []


def test_fields_of_a_caption_do_not_steer_decoding(data, out):
    """`encode` gives `source` and `samples` of a single file a meaning. Here they are words of the caption."""
    recording = audio(data / "a.wav")
    before = recording.read_bytes()
    write_json(data / "a.json", {"prompt": "words", "source": "a collection", "samples": 5})
    run(data, out)
    assert pair(out, 0)[1]["source"] == "a collection"
    model = AutoencoderModel(FakeBackend())
    with pytest.raises(OutputError, match=r"is the recording that .*000000000000\.json names as the source"):
        model.decode_file(out / "000000000000.npy", recording)
    assert recording.read_bytes() == before
    assert model.decode_file(out / "000000000000.npy", data / "other.wav") >= 100


def test_prompt_of_a_json_without_one(data, out):
    """The fields are kept, and the prompt comes from the next source. The reference's dataset needs a prompt."""
    audio(data / "a.wav")
    write_json(data / "a.json", {"title": "A Song", "bpm": 120, "artist": "Someone", "id": "x"})
    run(data, out)
    assert prompt_of(out) == ("Title: A Song, Artist: Someone, BPM: 120", "json")
    (data / "a.txt").write_text("words")
    run(data, out)
    assert prompt_of(out) == ("words", "txt")
    assert pair(out, 0)[1]["id"] == "x"


@pytest.mark.parametrize(
    "value", ["[1, 2]", '"text"', "5", "null", "{}", '{"id": 5}', '{"prompt": [1]}', '{"prompt": " "}']
)
def test_json_without_a_caption_leaves_it_to_the_next_source(data, out, value):
    audio(data / "a.wav")
    write_json(data / "a.json", value)
    (row,) = run(data, out).bad
    assert row["status"] == "no_caption"
    assert "a.json: has no prompt; write the caption there" in row["reason"]
    (data / "a.txt").write_text("words")
    assert run(data, out).encoded == 1
    assert prompt_of(out) == ("words", "txt")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"prompt": "caf\xe9"}',
        b"[" * 10**5,
        b'{"prompt": ' * 10**4,
        b'{"n": ' + b"9" * 10**4 + b"}",
        b'{"prompt": "a"} {"prompt": "b"}',
        b"\x00\x01",
    ],
    ids=["empty", "cut", "latin-1", "deep list", "deep object", "many digits", "two values", "binary"],
)
def test_damaged_json_is_one_bad_clip(data, out, content):
    audio(data / "a.wav")
    write_clip(data / "b.wav", 100, seed=1)
    (data / "a.json").write_bytes(content)
    (data / "a.txt").write_text("words")
    (row,) = run(data, out).bad
    assert (row["relpath"], row["status"]) == ("a.wav", "no_caption")
    assert "a.json: cannot be read as JSON (" in row["reason"]
    assert row["reason"].endswith("); write it again, or leave json out of --captions")
    assert len(row["reason"]) < 500
    # The cure works.
    assert run(data, out, captions=("txt",)).encoded == 1


def test_values_that_other_programs_cannot_read_are_left_out(data, out):
    audio(data / "a.wav")
    text = (
        '{"prompt": "old", "nan": NaN, "inf": 1e999, "half": "\\ud800", "zero": "a\\u0000b", "\\ud800": 1, "big": 1%s}'
    )
    write_json(data / "a.json", text.replace("}", ', "prompt": "last"}') % ("0" * 400))
    run(data, out)
    info = pair(out, 0)[1]
    # As in Python and in the scripts of trainers, the last of equal names counts.
    assert (set(info), info["prompt"]) == (FIELDS, "last")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_json_in_other_encodings(data, out, encoding):
    audio(data / "a.wav")
    (data / "a.json").write_bytes('{"prompt": "Café"}'.encode(encoding))
    run(data, out)
    assert prompt_of(out) == ("Café", "json")


@pytest.mark.parametrize("name", ["a.json", "a.txt"])
def test_huge_caption_file_is_refused(data, out, name):
    audio(data / "a.wav")
    with (data / name).open("wb") as file:
        file.truncate(2**40)
    (row,) = run(data, out).bad
    assert row["status"] == "unreadable"
    assert f"{name}: cannot be read (it has more than 1048576 bytes); " in row["reason"]


def test_caption_that_is_a_pipe_or_a_folder_is_none(data, out):
    audio(data / "a.wav")
    os.mkfifo(data / "a.json")
    (data / "a.txt").mkdir()
    write_json(data.parent / "txt" / "a.txt", "words")
    run(data, out)
    assert prompt_of(out) == ("words", "txt")


# --- Tags -------------------------------------------------------------------------------------------------------

TAGS = {"title": "A Song", "artist": "Someone", "album": "An Album", "genre": "House", "date": "2001"}


def write_tagged(path, seed=0, **tags):
    """Write an audio file whose tags libsndfile writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with sf.SoundFile(path, "w", 44_100, 2, format=path.suffix[1:].upper()) as file:
        for name, value in tags.items():
            setattr(file, name, value)
        file.write(noise((2000, 2), seed, 0.1))
    return path


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
@pytest.mark.parametrize("layout", ["numbered", "mirror"])
def test_tags_of_the_file_are_the_last_source(data, out, suffix, layout):
    pytest.importorskip("tinytag")
    write_tagged(data / f"a.{suffix}", **TAGS)
    options = {"captions": ("json", "txt", "tags"), "layout": layout}
    assert run(data, out, **options).encoded == 1
    info = json.loads((out / ("a.json" if layout == "mirror" else "000000000000.json")).read_text())
    assert {name: info[name] for name in TAGS} == TAGS
    assert info["caption_source"] == "tags"
    # Trainers that read mirrored folders make a prompt from the tags, each time another one.
    prompt = "Title: A Song, Artist: Someone, Album: An Album, Genre: House, Year: 2001"
    assert info.get("prompt") == (prompt if layout == "numbered" else None)
    assert verify(out) == []
    assert run(data, out, **options).unchanged == 1
    (data / "a.txt").write_text("words")
    assert run(data, out, **options).encoded == 1
    assert verify(out) == []


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="needs ffmpeg, which writes the tags")
@pytest.mark.parametrize("suffix", ["mp3", "m4a", "opus", "flac"])
def test_all_tags_of_trainers_are_read(tmp_path, suffix):
    pytest.importorskip("tinytag")
    tags = {**TAGS, "composer": "Another"}
    extra = {"mp3": {"TPUB": "A Label", "TBPM": "120"}, "m4a": {}}.get(suffix, {"label": "A Label", "bpm": "120"})
    write_tagged(tmp_path / "a.wav")
    pairs = [f"{name}={value}" for name, value in {**tags, **extra}.items()]
    arguments = [word for text in pairs for word in ("-metadata", text)]
    target = tmp_path / f"tagged.{suffix}"
    subprocess.run(["ffmpeg", "-v", "error", "-i", tmp_path / "a.wav", *arguments, target], check=True)
    expected = tags | ({"label": "A Label", "bpm": "120"} if extra else {})
    assert {name: str(value) for name, value in read_tags(str(target)).items()} == expected


def test_clip_without_caption_is_tried_again_with_tags(data, out):
    pytest.importorskip("tinytag")
    write_tagged(data / "a.flac", title="A Song")
    write_clip(data / "b.wav", 100)
    (data / "c.wav").write_bytes((data / "b.wav").read_bytes())
    assert run(data, out).statuses == {"encoded": 1, "no_caption": 2}
    report = run(data, out, captions=("json", "txt", "tags"))
    assert report.statuses == {"encoded": 2, "no_caption": 1}
    reason = report.bad[0]["reason"]
    assert (
        f"c.wav: has no caption (c.json, ../json/c.json, c.txt, ../txt/c.txt, tags); write one to {data}/c.txt"
        in reason
    )


def test_damaged_tags_do_no_harm(tmp_path, inputs):
    pytest.importorskip("tinytag")
    generator = random.Random(3)
    for suffix in ("wav", "flac", "ogg", "mp3", "aiff"):
        valid = write_tagged(tmp_path / f"a.{suffix}", title="A Song", artist="Someone").read_bytes()
        path = tmp_path / f"b.{suffix}"
        for _ in range(60):
            path.write_bytes(mutated_bytes(generator, valid))
            begin = time.process_time()
            tracemalloc.start()
            assert set(read_tags(str(path))) <= set(CAPTION_TAGS)
            assert tracemalloc.get_traced_memory()[1] < 2**26
            tracemalloc.stop()
            assert time.process_time() - begin < 2
            inputs["damaged files"] += 1


def test_without_the_package_of_tags_the_extra_is_named(data, out, monkeypatch):
    write_clip(data / "a.wav", 100)
    monkeypatch.setitem(sys.modules, "tinytag", None)
    with pytest.raises(InputError, match=r"run: .*pip install 'samekit\[tags\]'") as error:
        run(data, out, captions=("txt", "tags"))
    assert_one_line(error.value)
    assert not out.exists()


# --- The command ------------------------------------------------------------------------------------------------


def test_captions_of_the_command(engine_of, data, out):
    audio(data / "a.wav")
    write_json(data / "a.json", {"prompt": "from json"})
    (data / "a.txt").write_text("from txt")
    arguments = ("--model", engine_of(KINDS[0]).folder, "--data_dir", data, "--output_path", out)
    assert command(*arguments, "--captions", "txt,json").exit_code == 0
    assert prompt_of(out) == ("from txt", "txt")
    for captions in ("xml", "", "txt,txt"):
        result = command(*arguments, "--captions", captions)
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
        assert "pass some of json, txt, tags, each once" in result.stderr
    result = command(*arguments, "--captions", "json,tags,txt")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "captions are json,tags,txt, but tags are read last; put tags at the end" in result.stderr


def test_bad_clips_that_are_not_shown_are_counted(engine_of, data, out):
    write_clip(data / "good.wav", 100)
    for number in range(12):
        audio(data / f"{number}.wav", seed=number)
    result = command("--model", engine_of(KINDS[0]).folder, "--data_dir", data, "--output_path", out)
    assert result.stderr.count("has no caption") == 10
    assert "2 more bad clips; all are in .samekit/report.json\n" in result.stderr
