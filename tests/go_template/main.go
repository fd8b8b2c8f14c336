// Renders chats with Go's own text/template, in the way Ollama hands them to a model's template: the tests hold
// fastoss's Modelfile against it. Reads {"template", "chats"} from standard input, writes a JSON list of texts.
package main

import (
	"encoding/json"
	"log"
	"os"
	"strings"
	"text/template"
)

type arguments map[string]any

func (a arguments) String() string {
	text, _ := json.Marshal(map[string]any(a))
	return string(text)
}

type toolCall struct {
	Function struct {
		Name      string
		Arguments arguments
	}
}

type property struct {
	Type        string
	Description string
}

func (p property) ToTypeScriptType() string {
	switch p.Type {
	case "integer", "number":
		return "number"
	case "string", "boolean":
		return p.Type
	}
	return "any"
}

type tool struct {
	Function struct {
		Name        string
		Description string
		Parameters  struct {
			Required   []string
			Properties map[string]property
		}
	}
}

type message struct {
	Role, Content, Thinking, ToolName string
	ToolCalls                         []toolCall
}

type chat struct {
	Messages   []message
	Tools      []tool
	ThinkLevel string
}

func render(parsed *template.Template, given chat) string {
	var system []string
	var messages []*message
	for i := range given.Messages {
		each := &given.Messages[i]
		if each.Role == "system" {
			system = append(system, each.Content)
		}
		last := len(messages) - 1
		if last >= 0 && messages[last].Role == each.Role && each.Role != "tool" {
			messages[last].Content += "\n\n" + each.Content
		} else {
			messages = append(messages, each)
		}
	}
	var out strings.Builder
	err := parsed.Execute(&out, map[string]any{
		"System": strings.Join(system, "\n\n"), "Messages": messages, "Tools": given.Tools,
		"ThinkLevel": given.ThinkLevel, "Think": given.ThinkLevel != "", "IsThinkSet": given.ThinkLevel != "", "Response": "",
	})
	if err != nil {
		log.Fatal(err)
	}
	return out.String()
}

func main() {
	var asked struct {
		Template string
		Chats    []chat
	}
	if err := json.NewDecoder(os.Stdin).Decode(&asked); err != nil {
		log.Fatal(err)
	}
	parsed, err := template.New("").Option("missingkey=zero").Parse(asked.Template)
	if err != nil {
		log.Fatal(err)
	}
	texts := []string{}
	for _, given := range asked.Chats {
		texts = append(texts, render(parsed, given))
	}
	encoder := json.NewEncoder(os.Stdout)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(texts); err != nil {
		log.Fatal(err)
	}
}
