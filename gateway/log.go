// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"log/slog"
	"os"

	"golang.org/x/term"

	"github.com/bulkheadhq/bulkhead/gateway/config"
)

// NewLogger makes the logger that c describes.
func NewLogger(c config.Log, w *os.File) *slog.Logger {
	opts := &slog.HandlerOptions{Level: c.Level}
	if c.Format == config.Text || c.Format == config.Auto && term.IsTerminal(int(w.Fd())) {
		return slog.New(slog.NewTextHandler(w, opts))
	}
	return slog.New(slog.NewJSONHandler(w, opts))
}
