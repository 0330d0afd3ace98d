// SPDX-License-Identifier: Apache-2.0

// Package logs writes and reads the log files of one task.
//
// A task's directory holds current.log, which is written, and rotated files
// named by a growing number, 00000001.log before 00000002.log. A line is the
// container runtime interface's:
//
//	2026-11-24T10:00:00.123456789Z stdout F text
//
// F ends a line. P is a piece of one that goes on in the next piece of that
// stream; long lines are cut at MaxText, and what has been written without a
// newline is put out as a piece after a short while. F:notice is a line of our
// own about lost output; no command can write one.
//
// The package touches nothing but these files. One Writer writes a directory;
// any number of readers read it meanwhile. After a crash of the writer the last
// line may be torn; the next writer ends it and readers pass over it.
//
// It needs the standard library alone, because the logger of every sandbox is
// made of it.
package logs

import (
	"bytes"
	"errors"
	"fmt"
	"time"
)

// MaxText is the longest text of one written line. Longer lines are cut.
const MaxText = 16 << 10

// maxLine is the longest line a reader takes: other writers of the format may
// cut later than ours.
const maxLine = 256 << 10

// timeLayout is RFC 3339 with a fixed width, so that lines sort as text.
const timeLayout = "2006-01-02T15:04:05.000000000Z07:00"

// Stream says where a command wrote a line.
type Stream string

// The streams of a command. A terminal has stdout alone.
const (
	Stdout Stream = "stdout"
	Stderr Stream = "stderr"
)

// Line is one line of a log file.
type Line struct {
	Time    time.Time
	Stream  Stream
	Partial bool // the next line of this stream goes on with the same text
	Notice  bool // written by the logger, not by the command
	// Gap: lines before this one were rotated away before they were read. Only
	// Read sets it.
	Gap  bool
	Text []byte // without the newline
}

// ErrMalformed is wrapped by every error of ParseLine.
var ErrMalformed = errors.New("malformed log line")

// ParseLine reads one line, with or without its newline. Text points into b.
func ParseLine(b []byte) (Line, error) {
	b = bytes.TrimSuffix(b, []byte{'\n'})
	stamp, rest, ok := bytes.Cut(b, []byte{' '})
	if !ok {
		return Line{}, fmt.Errorf("%w: no stream", ErrMalformed)
	}
	at, err := time.Parse(time.RFC3339Nano, string(stamp))
	if err != nil {
		return Line{}, fmt.Errorf("%w: time: %w", ErrMalformed, err)
	}
	stream, rest, ok := bytes.Cut(rest, []byte{' '})
	if !ok {
		return Line{}, fmt.Errorf("%w: no tag", ErrMalformed)
	}
	l := Line{Time: at, Stream: Stream(stream)}
	if l.Stream != Stdout && l.Stream != Stderr {
		return Line{}, fmt.Errorf("%w: stream %.16q", ErrMalformed, stream)
	}
	tags, text, _ := bytes.Cut(rest, []byte{' '})
	first, others, _ := bytes.Cut(tags, []byte{':'})
	switch string(first) {
	case "F":
	case "P":
		l.Partial = true
	default:
		return Line{}, fmt.Errorf("%w: tag %.16q", ErrMalformed, tags)
	}
	l.Notice = string(others) == "notice"
	l.Text = text
	return l, nil
}

// AppendLine appends l and a newline to dst. The text must not hold a newline.
func AppendLine(dst []byte, l Line) []byte {
	return appendRest(l.Time.UTC().AppendFormat(dst, timeLayout), l)
}

// appendRest appends what comes after the time.
func appendRest(dst []byte, l Line) []byte {
	dst = append(dst, ' ')
	dst = append(dst, l.Stream...)
	if l.Partial {
		dst = append(dst, " P"...)
	} else {
		dst = append(dst, " F"...)
	}
	if l.Notice {
		dst = append(dst, ":notice"...)
	}
	dst = append(dst, ' ')
	dst = append(dst, l.Text...)
	return append(dst, '\n')
}
