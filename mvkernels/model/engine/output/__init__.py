"""What a request gives back: events, generation, transcript, text, trace page."""
