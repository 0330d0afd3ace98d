// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"io"
	"time"

	nodev1 "github.com/bulkheadhq/bulkhead/proto/node/v1"
)

// writeError is a failure on our side of the output, which asking the agent
// again would not cure.
type writeError struct{ err error }

func (e *writeError) Error() string { return e.err.Error() }
func (e *writeError) Unwrap() error { return e.err }

// follower reads a log, and after the agent was away goes on at the byte where
// it was. Entries of one stream have times that do not fall, so the last time
// and the bytes seen of it are a position, also when the log was rotated since.
type follower struct {
	node nodev1.NodeClient
	req  *nodev1.LogsRequest
	out  func(*nodev1.LogsResponse) error // its errors end the following

	at [3]position // by Stream
}

type position struct {
	timeNs int64
	bytes  int // of the entries with that time
}

// follow reads to the end of the log, which with req.Follow is the end of the
// sandbox. It may be called again after an error that was not a writeError.
func (f *follower) follow(ctx context.Context) error {
	req := f.req
	resumed := f.at
	var again [3]int // bytes seen again of the entries at the resumed position
	if resumed != [3]position{} {
		req = &nodev1.LogsRequest{Ref: f.req.GetRef(), Follow: f.req.GetFollow()}
	}
	stream, err := f.node.Logs(ctx, req)
	if err != nil {
		return err
	}
	for {
		e, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		n := int(e.GetStream())
		if n < 0 || n >= len(f.at) {
			n = 0
		}
		if resumed != [3]position{} {
			switch {
			case e.GetTimeNs() < resumed[n].timeNs:
				continue
			case e.GetTimeNs() == resumed[n].timeNs:
				skip := min(resumed[n].bytes-again[n], len(e.GetData()))
				again[n] += skip
				if e.Data = e.Data[skip:]; len(e.Data) == 0 {
					continue
				}
			}
		}
		if err := f.out(e); err != nil {
			return &writeError{err}
		}
		if p := &f.at[n]; p.timeNs == e.GetTimeNs() {
			p.bytes += len(e.GetData())
		} else {
			*p = position{e.GetTimeNs(), len(e.GetData())}
		}
	}
}

// splitTo sends each stream to its own writer, unchanged.
func splitTo(stdout, stderr io.Writer) func(*nodev1.LogsResponse) error {
	return func(e *nodev1.LogsResponse) error {
		w := stdout
		if e.GetStream() == nodev1.Stream_STREAM_STDERR {
			w = stderr
		}
		_, err := w.Write(e.GetData())
		return err
	}
}

// stamped puts the time before every line. A line that comes in pieces gets
// one.
func stamped(next func(*nodev1.LogsResponse) error) func(*nodev1.LogsResponse) error {
	var within [3]bool
	return func(e *nodev1.LogsResponse) error {
		n := int(e.GetStream()) % len(within)
		data := e.GetData()
		if !within[n] {
			stamp := time.Unix(0, e.GetTimeNs()).UTC().Format("2006-01-02T15:04:05.000000000Z ")
			data = append([]byte(stamp), data...)
		}
		within[n] = len(data) > 0 && data[len(data)-1] != '\n'
		return next(&nodev1.LogsResponse{Stream: e.GetStream(), TimeNs: e.GetTimeNs(), Data: data})
	}
}
