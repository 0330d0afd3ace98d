// SPDX-License-Identifier: Apache-2.0

package config

import (
	"io"
	"log/slog"
	"os"

	"golang.org/x/term"
)

// LogHandler is the slog handler that [log] asks for. auto is text on a
// terminal and JSON everywhere else, systemd's journal included.
func (c *Config) LogHandler(w io.Writer) slog.Handler {
	var level slog.Level
	_ = level.UnmarshalText([]byte(c.Log.Level)) // check has seen it
	opts := &slog.HandlerOptions{Level: level}
	f, isFile := w.(*os.File)
	if c.Log.Format == "text" || c.Log.Format == "auto" && isFile && term.IsTerminal(int(f.Fd())) {
		return slog.NewTextHandler(w, opts)
	}
	return slog.NewJSONHandler(w, opts)
}
