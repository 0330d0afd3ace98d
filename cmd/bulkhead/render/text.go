// SPDX-License-Identifier: Apache-2.0

// Package render turns what a node or a gateway answers into text: tables and
// reports for people, one JSON object a line for programs.
//
// It writes to the writer it is given and touches nothing else. Text that comes
// from a node may have been made by a tenant (names, messages of a command), so
// it passes through Clean and cannot move the cursor of the reader's terminal.
package render

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/docker/go-units"
)

// None stands in a cell that has no value.
const None = "-"

// Table writes rows under an upper-case header.
func Table(w io.Writer, header []string, rows [][]string) error {
	tw := tabwriter.NewWriter(w, 0, 8, 3, ' ', 0)
	writeRow(tw, header)
	for _, r := range rows {
		writeRow(tw, r)
	}
	return tw.Flush()
}

func writeRow(w io.Writer, cells []string) {
	for i, cell := range cells {
		if i > 0 {
			fmt.Fprint(w, "\t")
		}
		if cell = Clean(cell); cell == "" {
			cell = None
		}
		fmt.Fprint(w, cell)
	}
	fmt.Fprint(w, "\n")
}

// Clean makes s safe to show on one line of a terminal: control and formatting
// characters are written as escapes.
func Clean(s string) string {
	odd := func(r rune) bool { return !unicode.IsPrint(r) || r == unicode.ReplacementChar }
	if strings.IndexFunc(s, odd) < 0 {
		return s
	}
	var b strings.Builder
	for _, r := range s {
		if !odd(r) {
			b.WriteRune(r)
			continue
		}
		q := strconv.QuoteRuneToASCII(r)
		b.WriteString(q[1 : len(q)-1])
	}
	return b.String()
}

// Size writes bytes with a unit: 256MiB, 1.5GiB.
func Size[T int64 | uint64](bytes T) string { return units.BytesSize(float64(bytes)) }

// CPU writes thousandths of a core as cores: 0.5, 2, 0.125.
func CPU(millis int64) string {
	s := fmt.Sprintf("%d.%03d", millis/1000, millis%1000)
	return strings.TrimSuffix(strings.TrimRight(s, "0"), ".")
}

// Time writes a Unix time in nanoseconds as RFC 3339 in UTC, to the second.
func Time(ns int64) string {
	if ns == 0 {
		return None
	}
	return time.Unix(0, ns).UTC().Format(time.RFC3339)
}

// Duration writes whole milliseconds without zero parts: 1h, 1h30m, 250ms.
func Duration(ms int64) string {
	s := (time.Duration(ms) * time.Millisecond).String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// Command writes argv the way a person would type it in a shell.
func Command(argv []string) string {
	out := make([]string, len(argv))
	for i, a := range argv {
		out[i] = shellQuote(a)
	}
	return strings.Join(out, " ")
}

func shellQuote(s string) string {
	plain := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("-_=+.,:/@%", r)
	}
	if s != "" && strings.IndexFunc(s, func(r rune) bool { return !plain(r) }) < 0 {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

func count(n uint64) string { return strconv.FormatUint(n, 10) }

// Quantity writes an amount of a resource named as in a Denial.
func Quantity(resource string, n int64) string {
	switch resource {
	case "cpu_millis":
		return CPU(n)
	case "memory_bytes":
		return Size(n)
	}
	return strconv.FormatInt(n, 10)
}

// Resource writes the name of a resource as in a Denial for people.
func Resource(name string) string {
	switch name {
	case "cpu_millis":
		return "cpu"
	case "memory_bytes":
		return "memory"
	case "pids":
		return "processes"
	}
	return strings.ReplaceAll(name, "_", " ")
}
