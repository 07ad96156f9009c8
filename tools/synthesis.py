"""Synthesize music and sounds from a seed: training and test data of `same-tiny`, and the piece of the demo.

    notes ──┐
    drums ──┤                      ┌─ pan, width ─┐
    voice ──┼─ one mono line each ─┤              ├─ sum ─ spectral tilt ─ soft clip ─ loudness ─ [samples, 2]
    noise ──┤                      └─ reverb ─────┘
    chirps ─┘

Every clip depends only on a `numpy.random.Generator`. Clips have 44,100 Hz and are float32. As a program, this module
writes the piece of the demo.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.random import Generator

    Line = np.ndarray
    Instrument = Callable[[Generator, float, int], Line]

RATE = 44_100
SCALES = ((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10), (0, 2, 3, 5, 7, 9, 10), (0, 2, 4, 7, 9))
PROGRESSIONS = ((0, 3, 4, 0), (0, 5, 3, 4), (5, 3, 0, 4), (0, 4, 5, 3), (1, 4, 0, 0))
# Centre frequencies of three formants in Hz: a, e, i, o, u, and the schwa.
VOWELS = (
    (730, 1090, 2440),
    (530, 1840, 2480),
    (270, 2290, 3010),
    (570, 840, 2410),
    (300, 870, 2240),
    (500, 1500, 2500),
)


def seconds(samples: int) -> Line:
    """Return the time of each sample in seconds."""
    return np.arange(samples) / RATE


def phases(frequency: float | Line, samples: int, start: float = 0.0) -> Line:
    """Return the phase, in turns, of an oscillator whose frequency in Hz may vary."""
    return start + np.cumsum(np.broadcast_to(frequency, samples)) / RATE


def oscillator(turns: Line, harmonics: Line) -> Line:
    """Return a periodic wave with these amplitudes of harmonics, read from a table."""
    size = 4096
    spectrum = np.zeros(size // 2 + 1, complex)
    spectrum[1 : len(harmonics) + 1] = -0.5j * size * harmonics
    table = np.fft.irfft(spectrum)
    return table[(turns * size).astype(np.int64) % size]


def filtered(line: Line, gain: Callable[[Line], Line]) -> Line:
    """Return a line whose spectrum is multiplied by a gain over frequency in Hz."""
    padded = 2 ** int(np.ceil(np.log2(len(line) + 2048)))
    spectrum = np.fft.rfft(line, padded) * gain(np.fft.rfftfreq(padded, 1 / RATE))
    return np.fft.irfft(spectrum, padded)[: len(line)]


def low_pass(cutoff: float, slope: float = 2.0) -> Callable[[Line], Line]:
    """Return the gain of a low-pass filter."""
    return lambda frequency: 1 / (1 + (frequency / cutoff) ** (2 * slope)) ** 0.5


def band(centre: float, width: float) -> Callable[[Line], Line]:
    """Return the gain of a resonance; `width` is in octaves."""
    return lambda frequency: np.exp(-0.5 * (np.log2(np.maximum(frequency, 1) / centre) / width) ** 2)


def envelope(random: Generator, samples: int, attack: float, release: float, decay: float) -> Line:
    """Return an envelope, sometimes with tremolo; attack and release in seconds, `decay` per second."""
    time = seconds(samples)
    shape = np.minimum(time / attack, 1) * np.clip((time[-1] - time) / release, 0, 1) * np.exp(-decay * time)
    if random.random() < 0.2:
        shape = shape * (1 + random.uniform(0, 0.4) * np.sin(2 * np.pi * random.uniform(3, 8) * time))
    return shape


def sustained(random: Generator, frequency: float, samples: int) -> Line:
    """Return a tone of strings, organs or winds: harmonics with a slope, vibrato and detuned copies."""
    count = max(1, min(int(random.uniform(4, 60)), int(0.9 * RATE / 2 / frequency)))
    n = np.arange(1, count + 1)
    harmonics = n ** -random.uniform(0.8, 2.5) * np.exp(0.5 * random.standard_normal(count))
    if random.random() < 0.3:
        harmonics[1::2] *= random.uniform(0, 0.2)
    depth = random.choice([0, 0, 0.003, 0.008])
    vibrato = 1 + depth * np.sin(2 * np.pi * random.uniform(4, 7) * seconds(samples) + random.uniform(0, 6))
    line = np.zeros(samples)
    for _ in range(random.integers(1, 3)):
        detuned = frequency * 2 ** (random.normal(0, 5) / 1200) * vibrato
        line += oscillator(phases(detuned, samples, random.random()), harmonics)
    return line * envelope(random, samples, random.uniform(0.005, 0.15), 0.08, random.choice([0, 0.5, 2]))


def plucked(random: Generator, frequency: float, samples: int) -> Line:
    """Return a tone of a plucked string (Karplus and Strong, 1983): noise circulates through an averaging filter."""
    period = max(int(RATE / frequency), 2)
    excitation = random.uniform(-1, 1, period)
    smoothing = np.exp(-np.arange(period) * random.uniform(0.02, 1.0))
    string = np.fft.irfft(np.fft.rfft(excitation) * np.fft.rfft(smoothing / smoothing.sum()), period)
    string -= string.mean()
    loss = 0.001 ** (1 / (frequency * random.uniform(0.5, 4)))
    blend = random.uniform(0.3, 0.5)
    line = np.empty((samples // period + 1, period))
    for row in line:
        row[:] = string
        string = loss * ((1 - blend) * string + blend * np.roll(string, 1))
    flat = line.ravel()[:samples] * envelope(random, samples, 0.001, 0.02, 0)
    return flat / (np.abs(flat).max() + 1e-9)


def bell(random: Generator, frequency: float, samples: int) -> Line:
    """Return a tone of electric pianos or bells: one sine modulates another's phase (Chowning, 1973)."""
    ratio = random.choice([1, 2, 3, 3.5, 1.41, 7])
    time = seconds(samples)
    turns = phases(frequency, samples, random.random())
    index = random.uniform(0.05, 0.5) * np.exp(-random.uniform(1, 8) * time)
    line = np.sin(2 * np.pi * (turns + index * np.sin(2 * np.pi * ratio * turns)))
    return line * envelope(random, samples, 0.002, 0.03, random.uniform(1, 6))


INSTRUMENTS: tuple[Instrument, ...] = (sustained, plucked, bell)


def drum(random: Generator, kind: int, samples: int) -> Line:
    """Return a stroke of kick (0), snare (1), hat (2) or tom (3)."""
    time = seconds(samples)
    hiss = random.standard_normal(samples)
    if kind == 0:
        pitch = random.uniform(40, 70) * (1 + random.uniform(1, 5) * np.exp(-random.uniform(20, 60) * time))
        return np.sin(2 * np.pi * phases(pitch, samples)) * np.exp(-random.uniform(6, 20) * time)
    if kind == 1:
        body = np.sin(2 * np.pi * random.uniform(150, 250) * time) * np.exp(-random.uniform(12, 30) * time)
        rattle = filtered(hiss, band(random.uniform(1000, 5000), 1.2)) * np.exp(-random.uniform(10, 30) * time)
        return body + random.uniform(0.3, 1.2) * rattle
    if kind == 2:
        ring = filtered(hiss, lambda f: (f / 20000) ** random.uniform(1, 2))
        return random.uniform(0.1, 0.5) * ring * np.exp(-random.uniform(10, 80) * time)
    pitch = random.uniform(70, 250) * (1 + 0.5 * np.exp(-30 * time))
    return np.sin(2 * np.pi * phases(pitch, samples)) * np.exp(-random.uniform(5, 15) * time) + 0.05 * hiss * np.exp(
        -60 * time
    )


def voice(random: Generator, samples: int) -> Line:
    """Return syllables of speech or song: pulses through three formants; some begin with a consonant of noise."""
    line = np.zeros(samples)
    base = random.uniform(80, 300)
    start = 0
    while start < samples:
        length = int(random.uniform(0.12, 0.5) * RATE)
        pitch = base * 2 ** (random.normal(0, 0.15) + random.normal(0, 0.2) * np.linspace(0, 1, length))
        n = np.arange(1, max(2, int(8000 / base)))
        pulses = oscillator(phases(pitch, length), n**-1.0)
        formants = VOWELS[random.integers(len(VOWELS))]
        stretch = random.uniform(0.9, 1.2)
        spoken = sum(
            a * filtered(pulses, band(f * stretch, 0.2)) for a, f in zip((1, 0.5, 0.25), formants, strict=True)
        )
        spoken = spoken * np.hanning(length) ** 0.5
        if random.random() < 0.5:
            breath = length // 3
            hiss = filtered(random.standard_normal(breath), band(random.uniform(2000, 8000), 0.5))
            spoken[:breath] += random.uniform(0.05, 0.3) * hiss * np.hanning(breath)
        add(line, start, spoken)
        start += length + int(random.exponential(0.08) * RATE)
    return line


def chirp(random: Generator, samples: int) -> Line:
    """Return a sine that glides between two frequencies."""
    low, high = np.sort(np.exp(random.uniform(np.log(40), np.log(9000), 2)))
    ends = (low, high) if random.random() < 0.5 else (high, low)
    return np.sin(2 * np.pi * phases(np.geomspace(*ends, samples), samples)) * envelope(random, samples, 0.01, 0.05, 0)


def noise(random: Generator, samples: int) -> Line:
    """Return bursts of coloured noise, such as wind, surf, breath or steps."""
    coloured = filtered(random.standard_normal(samples), band(np.exp(random.uniform(4.5, 8.5)), random.uniform(0.3, 2)))
    swell = np.interp(np.arange(samples), np.linspace(0, samples, 12), random.uniform(0, 1, 12) ** 2)
    return coloured * swell


def add(line: Line, start: int, part: Line) -> None:
    """Add a part to a line, cut at the line's end."""
    stop = min(start + len(part), len(line))
    if stop > start:
        line[start:stop] += part[: stop - start]


def reverb(random: Generator, line: Line) -> Line:
    """Return the reverberation of a room, `[samples, 2]`: a different decaying noise for each ear."""
    length = int(random.uniform(0.1, 1.2) * RATE)
    response = random.standard_normal((2, length)) * np.exp(-6.9 * np.arange(length) / length)
    padded = 2 ** int(np.ceil(np.log2(len(line) + length)))
    damping = low_pass(random.uniform(1500, 8000), 1)(np.fft.rfftfreq(padded, 1 / RATE))
    wet = np.fft.irfft(np.fft.rfft(response, padded) * np.fft.rfft(line, padded) * damping, padded)[:, : len(line)]
    return (wet / (np.sqrt((wet**2).mean()) + 1e-9) * np.sqrt((line**2).mean())).T


def placed(random: Generator, line: Line) -> Line:
    """Place a mono line between the speakers, `[samples, 2]`: panned, sometimes delayed or with reverberation."""
    angle = np.pi / 4 * (1 + np.clip(random.normal(0, 0.35), -1, 1))
    stereo = np.stack([line * np.cos(angle), line * np.sin(angle)], axis=1)
    if random.random() < 0.15:
        stereo[:, random.integers(2)] = np.roll(stereo[:, 0], random.integers(5, 600))
    if random.random() < 0.6:
        stereo = stereo + random.uniform(0.05, 0.6) * reverb(random, line)
    return stereo


def level(line: Line) -> float:
    """Return the root mean square of a line, which is never zero."""
    return float(np.sqrt(np.mean(line**2))) + 1e-9


def note(midi: float) -> float:
    """Return the frequency in Hz of a MIDI note number."""
    return float(440 * 2 ** ((midi - 69) / 12))


def music_lines(random: Generator, samples: int) -> list[tuple[Line, float]]:
    """Return bass, chords, melody and drums of one piece, each with its level."""
    beat = int(RATE * 60 / random.uniform(60, 170))
    scale = SCALES[random.integers(len(SCALES))]
    progression = PROGRESSIONS[random.integers(len(PROGRESSIONS))]
    root = int(random.integers(45, 57))

    def degree(step: int, octave: int = 0) -> float:
        return note(root + 12 * (octave + step // len(scale)) + scale[step % len(scale)])

    bass, chords, melody, drums = (np.zeros(samples) for _ in range(4))
    instruments = [INSTRUMENTS[i] for i in random.integers(len(INSTRUMENTS), size=3)]
    notes_per_beat = random.choice([1, 2, 2, 4])
    pattern = [random.random(8) < chance for chance in (0.4, 0.3, 0.7, 0.1)]
    step = int(random.integers(0, 7))
    for number, start in enumerate(range(0, samples, beat)):
        chord = progression[number // 4 % len(progression)]
        if number % random.choice([1, 2, 4]) == 0:
            add(bass, start, instruments[0](random, degree(chord, -1 - int(random.integers(0, 2))), beat * 3 // 2))
        if number % 4 == 0:
            length = int(beat * random.choice([1, 4]))
            for tone in (0, 2, 4, 6)[: random.integers(2, 5)]:
                add(chords, start, instruments[1](random, degree(chord + tone), length))
        for part in range(notes_per_beat):
            if random.random() < 0.6:
                step = int(np.clip(step + random.integers(-2, 3), -3, 12))
                tone = instruments[2](random, degree(step, 1), int(beat / notes_per_beat * random.uniform(0.8, 2)))
                add(melody, start + part * beat // notes_per_beat, tone)
        _add_drums(random, drums, start, beat, [hits[2 * number % 8 :][:2] for hits in pattern])
    return [
        (bass, random.uniform(0.3, 1)),
        (chords, random.uniform(0.2, 0.8)),
        (melody, random.uniform(0.2, 0.9)),
        (drums, random.choice([0, 0.3, 0.6])),
    ]


def _add_drums(random: Generator, line: Line, start: int, beat: int, hits: list[Line]) -> None:
    """Add the drums of one beat; `hits` says whether each drum plays in the first and the second half."""
    for half in range(2):
        for kind, struck in enumerate(hits):
            if struck[half]:
                add(line, start + half * beat // 2, drum(random, kind, RATE // 3))


def sound_lines(random: Generator, samples: int) -> list[tuple[Line, float]]:
    """Return sounds other than music: voices, chirps, noise, single notes, each with its level."""
    makers = (voice, voice, chirp, noise, _single_notes)
    chosen = [makers[i] for i in random.integers(len(makers), size=random.integers(1, 3))]
    return [(maker(random, samples), random.uniform(0.3, 1)) for maker in chosen]


def _single_notes(random: Generator, samples: int) -> Line:
    """Return consecutive notes of one instrument over the whole keyboard."""
    line = np.zeros(samples)
    instrument = INSTRUMENTS[random.integers(len(INSTRUMENTS))]
    start = 0
    while start < samples:
        length = int(random.uniform(0.2, 1.5) * RATE)
        add(line, start, instrument(random, note(random.uniform(30, 90)), length))
        start += int(length * random.uniform(0.3, 1.1))
    return line


def clip(random: Generator, length: float, *, music: bool | None = None) -> Line:
    """Return a stereo clip, `[samples, 2]` in float32, with a peak of at most 1.

    Args:
        random: the source of all random choices.
        length: in seconds.
        music: a piece of music or other sounds; unless given, three of four clips are music.
    """
    samples = int(length * RATE)
    music = random.random() < 0.75 if music is None else music
    lines = music_lines(random, samples) if music else sound_lines(random, samples)
    if music and random.random() < 0.2:
        lines += [(voice(random, samples), random.uniform(0.2, 0.8))]
    return _mixed(random, samples, lines)


def speech(random: Generator, length: float) -> Line:
    """Return a voice in a room, `[samples, 2]` in float32, with a peak of at most 1; `length` is in seconds."""
    samples = int(length * RATE)
    return _mixed(random, samples, [(voice(random, samples), 1.0)])


def _mixed(random: Generator, samples: int, lines: list[tuple[Line, float]]) -> Line:
    """Return the stereo mix of mono lines with their levels, at a random loudness."""
    mix = np.zeros((samples, 2))
    for line, weight in lines:
        mix += placed(random, line) * (weight / level(line))
    # Recorded music has less energy at high frequencies.
    tilt = low_pass(np.exp(random.uniform(np.log(800), np.log(9000))), random.uniform(0.4, 1.2))
    mix = np.stack([filtered(channel, tilt) for channel in mix.T], axis=1)
    mix += 1e-4 * random.standard_normal(mix.shape) * level(mix)
    mix = np.tanh(mix / level(mix) * random.uniform(0.15, 0.5))
    loudness = 10 ** (random.uniform(-34, -9) / 20)
    return (mix * min(loudness / level(mix), 1 / np.abs(mix).max())).astype(np.float32)


def piece() -> Line:
    """Return the piece of the demo, `[samples, 2]`: 24 s with bass, chords, melody and drums."""
    # Training used other seeds.
    music = clip(np.random.default_rng(4), 24.0, music=True)
    return music * (0.7 / np.abs(music).max())


if __name__ == "__main__":
    import soundfile

    soundfile.write(Path(__file__).parents[1] / "runtime" / "samekit" / "demo.ogg", piece(), RATE)
