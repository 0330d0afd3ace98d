// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/base64"
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/bulkheadhq/bulkhead/cmd/bulkhead/render"
	nodev1 "github.com/bulkheadhq/bulkhead/proto/node/v1"
)

func (c *cli) logsCmd() *cobra.Command {
	var follow, timestamps, onlyOut, onlyErr bool
	var tail, since string
	cmd := &cobra.Command{
		Use:     "logs [flags] SANDBOX",
		Aliases: []string{"log"},
		Short:   "Print what a sandbox has written",
		Long: `Print what a sandbox has written, byte for byte, also after it has stopped. Its standard
output goes to standard output and its standard error to standard error; with --stdout or
--stderr that one alone is printed, and goes to standard output.

With -o json each entry is an object with time, stream, and text, or base64 where the
bytes are not UTF-8.`,
		Example: `  bulkhead logs -f web
  bulkhead logs --tail 100 --timestamps web
  bulkhead logs --stderr --since 10m web | grep panic`,
		Args:              args(1, 1, "[flags] SANDBOX"),
		ValidArgsFunction: c.completeSandboxes,
		RunE: func(cmd *cobra.Command, refs []string) error {
			req := &nodev1.LogsRequest{Ref: refs[0], Follow: follow}
			var err error
			if req.Tail, err = parseTail(tail); err != nil {
				return err
			}
			from := int64(0)
			if since != "" {
				t, err := parseMoment(since, time.Now())
				if err != nil {
					return usagef("--since: %v", err)
				}
				from = t.UnixNano()
			}
			node, err := c.node()
			if err != nil {
				return err
			}
			out := c.logWriter(timestamps, onlyOut != onlyErr)
			f := &follower{node: node, req: req, out: func(e *nodev1.LogsResponse) error {
				isErr := e.GetStream() == nodev1.Stream_STREAM_STDERR
				if e.GetTimeNs() < from || onlyOut != onlyErr && isErr != onlyErr {
					return nil
				}
				return out(e)
			}}
			notice := func(msg string) { c.sayf(cmd, "%s", msg) }
			return c.outlast(cmd.Context(), notice, func() error { return f.follow(cmd.Context()) })
		},
	}
	fl := cmd.Flags()
	fl.BoolVarP(&follow, "follow", "f", false, "stay until the sandbox has stopped")
	fl.StringVarP(&tail, "tail", "n", "all", "how many of the last lines, or all")
	fl.StringVar(&since, "since", "", "nothing older: RFC 3339, a date, or a time ago as in 10m")
	fl.BoolVarP(&timestamps, "timestamps", "t", false, "put the time before each line")
	fl.BoolVar(&onlyOut, "stdout", false, "standard output only")
	fl.BoolVar(&onlyErr, "stderr", false, "standard error only")
	return cmd
}

func (c *cli) logWriter(timestamps, oneStream bool) func(*nodev1.LogsResponse) error {
	if c.json() {
		return c.logJSON
	}
	out := splitTo(c.stdout, c.stderr)
	if oneStream {
		out = splitTo(c.stdout, c.stdout)
	}
	if timestamps {
		out = stamped(out)
	}
	return out
}

func (c *cli) logJSON(e *nodev1.LogsResponse) error {
	stream := strings.ToLower(strings.TrimPrefix(e.GetStream().String(), "STREAM_"))
	body := render.Field{Name: "text", Value: string(e.GetData())}
	if !utf8.Valid(e.GetData()) {
		body = render.Field{Name: "base64", Value: base64.StdEncoding.EncodeToString(e.GetData())}
	}
	when := time.Unix(0, e.GetTimeNs()).UTC().Format(time.RFC3339Nano)
	return render.JSONFields(c.stdout, render.Field{Name: "time", Value: when}, render.Field{Name: "stream", Value: stream}, body)
}

// parseTail turns what people write into what the API means: there 0 is all
// and a negative number none.
func parseTail(s string) (int64, error) {
	if s == "all" {
		return 0, nil
	}
	n, err := strconv.ParseInt(s, 10, 64)
	switch {
	case err != nil:
		return 0, usagef("--tail: %q is not a number of lines, nor all", s)
	case n < 0:
		return 0, nil
	case n == 0:
		return -1, nil
	}
	return n, nil
}

// parseMoment reads RFC 3339, a date (its beginning in UTC), or how long ago.
func parseMoment(s string, now time.Time) (time.Time, error) {
	for _, layout := range []string{time.RFC3339Nano, time.DateOnly} {
		if t, err := time.Parse(layout, s); err == nil {
			return t, nil
		}
	}
	if s == "now" {
		return now, nil
	}
	if d, err := parseDuration(s); err == nil {
		return now.Add(-d), nil
	}
	return time.Time{}, fmt.Errorf("%q is no time; write 2026-11-02T15:04:05Z, 2026-11-02, or 24h for a day ago", s)
}
