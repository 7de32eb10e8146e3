"""Songs and playlists."""

from dataclasses import dataclass, field
from random import Random

from nanotoolrl.world.api import API, ToolError, check_known, record
from nanotoolrl.world.goals import Goal, register
from nanotoolrl.world.words import NOUNS, PEOPLE, ids, titles


@dataclass
class Music(API):
    """Songs and playlists."""

    pool = "ood"
    songs: list[dict] = field(default_factory=list)
    playlists: dict[str, list[int]] = field(default_factory=dict)

    def find_songs(self, artist: str) -> list[dict]:
        """List the songs of an artist."""
        check_known("artist", artist, sorted({song["artist"] for song in self.songs}))
        return [{"title": song["title"], "id": song["id"]} for song in self.songs if song["artist"] == artist]

    def make_playlist(self, playlist: str) -> str:
        """Make an empty playlist."""
        if playlist in self.playlists:
            raise ToolError(f"playlist '{playlist}' exists already")
        self.playlists[playlist] = []
        return "made"

    def add_song(self, playlist: str, song_id: int) -> str:
        """Add a song to a playlist."""
        check_known("playlist", playlist, self.playlists)
        record(self.songs, "song", song_id)
        self.playlists[playlist].append(song_id)
        return "added"

    def clear_playlist(self, playlist: str) -> str:
        """Remove all songs from a playlist."""
        check_known("playlist", playlist, self.playlists)
        self.playlists[playlist] = []
        return "cleared"


def world(rng: Random, size: int) -> dict:
    artists = rng.sample(PEOPLE, 2)
    rows = zip(ids(rng, size), titles(rng, size), strict=True)
    songs = [{"id": i, "title": t, "artist": rng.choice(artists)} for i, t in rows]
    return {"songs": songs, "playlists": {n: [rng.choice(songs)["id"]] for n in rng.sample(NOUNS, 3)}}


def draw(rng: Random, api: Music) -> dict:
    song, full = rng.choice(api.songs), [name for name, songs in api.playlists.items() if songs]
    drawn = {"artist": song["artist"], "song": song["title"], "playlist": rng.choice(full)}
    return drawn | {"new_playlist": rng.choice([n for n in NOUNS if n not in api.playlists])}


GOALS = [
    Goal("What songs are by {artist}?|List the songs of {artist}.", "find_songs artist"),
    Goal(
        "Add '{song}' by {artist} to {playlist}.|Put '{song}' by {artist} on the playlist {playlist}.",
        "find_songs artist; add_song playlist song_id=id",
        "Added.",
        vague="Add '{song}' by {artist} to a playlist.|Put '{song}' by {artist} on one of my playlists.",
        question="Which playlist?",
        answer="{playlist}.|The one called {playlist}.",
    ),
    Goal(
        "Make a playlist {new_playlist} with '{song}' by {artist}.|"
        "Start the playlist {new_playlist} with '{song}' by {artist}.",
        "make_playlist playlist=new_playlist; find_songs artist; add_song playlist=new_playlist song_id=id",
        "Made.",
    ),
    Goal(
        "Clear the playlist {playlist}.|Empty the playlist {playlist}.", "clear_playlist playlist", "Cleared."
    ),
]

register(Music, world, draw, GOALS, named=["song"], groups=["artist"])
