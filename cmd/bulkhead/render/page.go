// SPDX-License-Identifier: Apache-2.0

package render

import (
	"fmt"
	"io"
	"strings"
)

// page writes a report piece by piece and keeps the first error.
type page struct {
	w   io.Writer
	err error
}

func (p *page) line(s string) {
	if p.err == nil {
		_, p.err = io.WriteString(p.w, s+"\n")
	}
}

// pairs writes "Key:   value" lines with the values under each other.
func (p *page) pairs(kv [][2]string) {
	wide := 0
	for _, e := range kv {
		wide = max(wide, len(e[0]))
	}
	for _, e := range kv {
		p.line(fmt.Sprintf("%-*s %s", wide+1, e[0]+":", Clean(e[1])))
	}
}

// list writes nothing if items is empty.
func (p *page) list(title string, items []string) {
	if len(items) == 0 {
		return
	}
	p.line("\n" + title + ":")
	for _, item := range items {
		p.line("  - " + Clean(item))
	}
}

func (p *page) table(title string, header []string, rows [][]string) {
	p.line("\n" + title + ":")
	var b strings.Builder
	if err := Table(&b, header, rows); err != nil && p.err == nil {
		p.err = err
	}
	for l := range strings.Lines(b.String()) {
		p.line("  " + strings.TrimRight(l, "\n"))
	}
}

// text writes a block of lines that somebody else wrote, indented.
func (p *page) text(title, block string) {
	if strings.TrimSpace(block) == "" {
		return
	}
	p.line("\n" + title + ":")
	for l := range strings.Lines(strings.TrimRight(block, "\n")) {
		p.line(strings.TrimRight("  "+Clean(strings.TrimRight(l, "\n")), " "))
	}
}
